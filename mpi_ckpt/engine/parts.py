# SPDX-License-Identifier: Apache-2.0
"""States of which every rank holds a part: root gets the parts, and gives them back."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, agree_on_root, gather_bytes, scatter_bytes
from mpi_ckpt.engine.read_plan import Place, plan_reads
from mpi_ckpt.errors import RestoreError, StageError
from mpi_ckpt.state import Arrival, PartsState, State
from mpi_ckpt.storage.prefetch import Prefetcher, Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.states.ranked import RankedState
    from mpi_ckpt.storage.manifest import StoredState
    from mpi_ckpt.storage.reader import GenerationReader

__all__ = ["combine_parts", "deal_parts"]


def combine_parts(comm: Communicator, states: Sequence[State]) -> None:
    """Bring the parts of all ranks to root, for the states that have parts.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.

    Raises:
        StageError: On every rank, if a part cannot be given or taken on any.
    """
    for state in states:
        if not isinstance(state, PartsState):
            continue
        doing = f"collecting the parts of state {state.name!r}"
        part = agree(comm, doing, state.part, error=StageError)
        parts = gather_bytes(comm, part, doing)

        def combine(state: PartsState = state, parts: list[bytes] = parts) -> None:
            state.combine(parts)

        agree_on_root(comm, doing, combine, error=StageError)
        state.combined()


@dataclass(frozen=True, slots=True)
class _Deal:
    """What root sends to the ranks.

    Attributes:
        lengths: Bytes for each rank, in rank order.
        turns: Gives some ranks and the part for each of them.
    """

    lengths: Sequence[int]
    turns: Iterator[tuple[Sequence[int], bytes]]


def deal_parts(
    session: Session, reader: GenerationReader | None, state: RankedState, saved: int
) -> Arrival:
    """Send each rank its part of a saved state, read and proven on root.

    Collective. Main thread only. Changes no state.

    Args:
        session: The manager's.
        reader: The open generation on root, which has the state; None elsewhere.
        state: The same on every rank.
        saved: Number of its parts.

    Returns:
        How the state takes over the part of this rank.

    Raises:
        CorruptGenerationError: On every rank, if bytes are not those that were saved.
        RestoreError: On every rank, if the state cannot make parts for so many ranks.
    """
    comm, window = session.comm, session.options.window_bytes
    doing = f"dealing out the parts of state {state.name!r}"

    def plan() -> _Deal | None:
        return _plan(reader, state, comm.size, window) if reader else None

    deal = agree(comm, doing, plan, error=RestoreError)
    part = scatter_bytes(
        comm,
        deal.lengths if deal else (),
        deal.turns if deal else (),
        doing,
        error=RestoreError,
        window_bytes=window,
    )
    count = comm.size if state.resizes else saved
    return Arrival((), adopt=lambda: state.take(part, count))


def _plan(
    reader: GenerationReader, state: RankedState, size: int, window_bytes: int
) -> _Deal:
    stored = reader.manifest.state(state.name)
    assert stored is not None
    saved = len(stored.leaves)
    if state.resizes and saved != size:
        read = dict(_read(reader, stored, range(saved), window_bytes))
        made = state.resize([read[number] for number in range(saved)], size)
        turns = (([rank], part) for rank, part in enumerate(made))
        return _Deal([len(part) for part in made], turns)
    ranks_of: dict[int, list[int]] = {}
    lengths = [0] * size
    for rank in range(size):
        source = state.source(rank, saved)
        if source is not None:
            ranks_of.setdefault(source, []).append(rank)
            lengths[rank] = stored.leaves[source].extent.nbytes
    parts = _read(reader, stored, sorted(ranks_of), window_bytes)
    return _Deal(lengths, ((ranks_of[number], part) for number, part in parts))


def _read(
    reader: GenerationReader,
    stored: StoredState,
    numbers: Sequence[int],
    window_bytes: int,
) -> Iterator[tuple[int, bytes]]:
    """Give the leaves of these numbers, in the order of the file, each proven."""
    files = [file.name for file in reader.manifest.files]
    extents = [stored.leaves[number].extent for number in numbers]
    batches = plan_reads(
        [Place(files.index(one.file), one.offset, one.nbytes) for one in extents],
        block_bytes=reader.manifest.block_bytes,
        window_bytes=window_bytes // 2,
    )
    runs = [Run(files[batch.file], batch.start, batch.end) for batch in batches]
    arriving: dict[int, bytearray] = {}
    with closing(Prefetcher(reader, runs)) as prefetcher:
        for batch in batches:
            window = prefetcher.take()
            for piece in batch.pieces:
                start = piece.offset - batch.start
                data = window[start : start + piece.nbytes]
                reader.prove(extents[piece.leaf], piece.block, data)
                arriving.setdefault(piece.leaf, bytearray()).extend(data)
                if piece.last:
                    yield numbers[piece.leaf], bytes(arriving.pop(piece.leaf))
