# SPDX-License-Identifier: Apache-2.0
"""Brings parts that lie in files of tiles to their ranks, and not through root.

Each rank of a save has written its own part there. Root finds in the manifest which rank
gets which part, and reads none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm import UNTOUCHED
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.engine.restore.cut.dealing import (
    deal_parts,
    is_dealt,
    open_dealt_part,
    ranks_of_parts,
)
from mpi_ckpt.engine.restore.cut.trading import trade_tiles
from mpi_ckpt.engine.restore.cut.wanted import LeafIndex, TradedTile, Wants, join_tiles
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import LeafSpec, MemoryBuffer
from mpi_ckpt.states.packed import packed_head
from mpi_ckpt.states.unshared.ranked import RankedState
from mpi_ckpt.storage.format.layout import find_parts
from mpi_ckpt.storage.reading.assembly import stored_array

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Deferred
    from mpi_ckpt.engine.restore.cut.trade_plan import Trades
    from mpi_ckpt.engine.restore.matching import MatchedState, StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import Progress
    from mpi_ckpt.state import Arrival
    from mpi_ckpt.storage.format.layout import PartLeaves
    from mpi_ckpt.storage.format.manifest import CutLeaf, StoredLeaf, StoredTile
    from mpi_ckpt.storage.reading.reader import GenerationReader

PartForm = list[Any]
"""JSON values: whether the first leaf is the structure, and the leaves within the part."""


@dataclass(frozen=True, slots=True)
class PartWants:
    """The parts that all ranks get, joined by root.

    Attributes:
        wants: The tiles that they take.
        forms: Rank -> state -> the form of its part.
    """

    wants: Wants
    forms: Sequence[Mapping[str, PartForm]]


def join_part_wants(reader: GenerationReader, match: StateMatch, size: int) -> PartWants:
    """Find which rank gets which leaves. Not collective. On root.

    Args:
        reader: The open generation.
        match: The states to restore.
        size: Number of ranks.

    Raises:
        CorruptGenerationError: On the calling rank, if a list of tiles is damaged.
    """
    forms: list[dict[str, PartForm]] = [{} for _ in range(size)]
    leaves: list[LeafIndex] = []
    specs: list[LeafSpec] = []
    stored: list[tuple[int, StoredTile]] = []
    wanted: list[tuple[int, int, int, Box]] = []
    filled = [0] * size
    for index, state in traded_states(match, size):
        there = reader.manifest.state(state.name)
        assert there is not None
        saved: list[StoredLeaf | CutLeaf] = [*there.leaves, *there.cut]
        found = find_parts([leaf.spec.name for leaf in saved])
        for source, ranks in ranks_of_parts(state, size, len(found)).items():
            for number, name in _leaves_of(found[source]):
                spec = saved[number].spec
                array = stored_array(reader, state.name, saved[number])
                stored += [(len(leaves), tile) for tile in array.tiles]
                for rank in ranks:
                    form = forms[rank].setdefault(state.name, [name is None, []])
                    form[1].append([name or "", spec.dtype, spec.shape])
                    if spec.nbytes:
                        wanted.append(
                            (len(leaves), rank, filled[rank], Box.whole(spec.shape))
                        )
                        filled[rank] += 1
                leaves.append(LeafIndex(index, number))
                specs.append(spec)
    return PartWants(join_tiles(leaves, specs, stored, wanted), forms)


def traded_states(match: StateMatch, size: int) -> Iterable[tuple[int, RankedState]]:
    """Return the states whose parts arrive so, with their numbers. Not collective."""
    return [
        (number, matched.state)
        for number, matched in enumerate(match.states)
        if isinstance(matched.state, RankedState)
        and matched.saved.parts is not None
        and not is_dealt(matched, size)
    ]


def transfer_parts(
    session: Session,
    found: OpenGeneration,
    match: StateMatch,
    trades: Trades | None,
    deferred: Deferred,
    progress: Progress,
) -> tuple[StateMatch, int]:
    """Bring each rank its parts, into private memory.

    Collective. Main thread only. Changes no state.

    Args:
        session: The manager's.
        found: The generation.
        match: The states to restore.
        trades: What the ranks exchange; None for nothing.
        deferred: Keeps the error of a part, to be raised before anything is overwritten.
        progress: Counts the bytes that are dealt out, on root, and those of `trade_tiles`.

    Returns:
        The same states, those with parts ready to take over this rank's; and the bytes that
        this rank has read of files of tiles.

    Raises:
        CorruptGenerationError: On every rank, if bytes are not those saved.
        ReadError: On every rank, if a rank cannot read.
    """
    traded = () if trades is None else trades.with_parts
    match = deal_parts(session, found, match, traded, deferred, progress)
    if trades is None or trades.of_parts is None:
        return match, 0
    room, safe = PartRoom(trades.part_forms), (UNTOUCHED, UNTOUCHED)
    args = session, found, trades.of_parts, room.tiles(), deferred
    nbytes = trade_tiles(*args, safe=safe, progress=progress)
    matched = {one.state.name: one for one in match.states}
    arrivals: dict[str, Arrival] = {}

    def open_part(one: MatchedState) -> None:
        name = one.state.name
        arrivals[name] = open_dealt_part(one, room.packed(name), session.comm.size)

    for name in traded:
        deferred.attempt(partial(open_part, matched[name]))
    return match.with_arrivals(arrivals), nbytes


class PartRoom:
    """Memory for this rank's parts, to be filled by a trade. Not collective.

    Args:
        forms: State -> the form of its part.
    """

    def __init__(self, forms: Mapping[str, PartForm]) -> None:
        self._forms = forms
        self._memory = {
            state: [MemoryBuffer.empty(LeafSpec.from_json(leaf).nbytes) for leaf in leaves]
            for state, (_, leaves) in forms.items()
        }

    def tiles(self) -> list[TradedTile]:
        """Return the places of the leaves, in the order of `join_part_wants`."""
        return [
            _tile(state, LeafSpec.from_json(leaf), memory)
            for state, (_, leaves) in self._forms.items()
            for leaf, memory in zip(leaves, self._memory[state], strict=True)
            if len(memory.read())
        ]

    def packed(self, state: str) -> bytes:
        """Return a part as the bytes of `pack`, once it came; empty if there is none."""
        if state not in self._forms:
            return b""
        has_structure, leaves = self._forms[state]
        memory = [one.read() for one in self._memory.pop(state)]
        if not has_structure:
            return b"".join(memory)
        specs = [LeafSpec.from_json(leaf) for leaf in leaves[1:]]
        head = packed_head(bytes(memory[0]), specs, [spec.name for spec in specs])
        return b"".join([head, *memory[1:]])


class _Room(MemoryBuffer):
    """Memory of elements that any box may fill."""

    def __init__(self, memory: memoryview, shape: tuple[int, ...], width: int) -> None:
        super().__init__(memory)
        self._shape, self._width = shape, width

    def part(self, _: tuple[slice, ...]) -> MemoryBuffer:
        raise NotImplementedError  # `host_bytes` is there

    def host_bytes(self) -> NDArray[np.uint8]:
        flat = np.frombuffer(self.read(), np.uint8)
        return flat.reshape(*self._shape, self._width)


def _tile(state: str, spec: LeafSpec, memory: MemoryBuffer) -> TradedTile:
    width = dtypes.element_bytes(spec.dtype)
    room = _Room(memory.read(), spec.shape, width)
    return TradedTile(f"state {state!r}, leaf {spec.name!r}", spec.shape, width, room)


def _leaves_of(part: PartLeaves) -> Iterable[tuple[int, str | None]]:
    """Return the numbers and names of a part's leaves; the structure has no name."""
    if part.structure is not None:
        yield part.structure, None
    yield from zip(part.numbers, part.names, strict=True)
