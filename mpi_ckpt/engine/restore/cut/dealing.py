# SPDX-License-Identifier: Apache-2.0
"""Reads and proves the parts of ranks on root, and sends each rank its own part."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mpi_ckpt.comm import scatter_bytes
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.failures import concerning
from mpi_ckpt.states.packed import packed_head
from mpi_ckpt.states.unshared.ranked import RankedState
from mpi_ckpt.storage.format.layout import find_parts
from mpi_ckpt.storage.reading.assembly import read_box, stored_array
from mpi_ckpt.storage.reading.proving import proven_blocks
from mpi_ckpt.storage.reading.read_queue import SLOTS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from mpi_ckpt.comm import Deferred
    from mpi_ckpt.engine.restore.matching import MatchedState, StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import Progress
    from mpi_ckpt.state import Arrival
    from mpi_ckpt.storage.format.manifest import CutLeaf, StoredLeaf
    from mpi_ckpt.storage.reading.reader import GenerationReader


class SavedParts:
    """The parts of one state, as `RankedState.open_part` takes them.

    Not collective.

    Args:
        reader: The open generation.
        name: Name of the state.
        window_bytes: How much to read at a time, in bytes; a longer part is read alone.

    Attributes:
        found: The leaves of each part, in rank order.
    """

    def __init__(self, reader: GenerationReader, name: str, window_bytes: int) -> None:
        stored = reader.manifest.state(name)
        assert stored is not None
        self._leaves: list[StoredLeaf | CutLeaf] = [*stored.leaves, *stored.cut]
        self._reader = reader
        self._name = name
        self._window_bytes = window_bytes
        self._heads: dict[int, bytes] = {}
        self.found = find_parts([leaf.spec.name for leaf in self._leaves])

    def lengths(self, ranks: Sequence[int]) -> list[int]:
        """Return the lengths of some parts in bytes. Reads their structures.

        Raises:
            CorruptGenerationError: On the calling rank, if bytes are not those saved.
            ReadError: On the calling rank, if the operating system cannot read them.
        """
        self._read_structures(ranks)
        return [len(self._heads[rank]) + self._nbytes(rank) for rank in ranks]

    def read(self, ranks: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield some parts, each with its rank, in the order of the ranks.

        Raises:
            CorruptGenerationError: On the calling rank, if bytes are not those saved.
            ReadError: On the calling rank, if the operating system cannot read them.
        """
        self._read_structures(ranks)
        for some in self._windows(ranks):
            numbers = [number for rank in some for number in self.found[rank].numbers]
            data = iter(self._read(numbers))
            for rank in some:
                mine = [next(data) for _ in self.found[rank].numbers]
                yield rank, b"".join([self._heads.pop(rank), *mine])

    def _read_structures(self, ranks: Sequence[int]) -> None:
        """Make the heads of some parts that have none yet."""
        to_read: dict[int, int] = {}
        for rank in ranks:
            structure = self.found[rank].structure
            if rank in self._heads:
                continue
            if structure is None:
                self._heads[rank] = b""
            else:
                to_read[rank] = structure
        for rank, text in zip(to_read, self._read(list(to_read.values())), strict=True):
            part = self.found[rank]
            specs = [self._leaves[number].spec for number in part.numbers]
            self._heads[rank] = packed_head(bytes(text), specs, part.names)

    def _windows(self, ranks: Sequence[int]) -> Iterator[list[int]]:
        """Yield runs of ranks whose parts fit into a window together."""
        some: list[int] = []
        nbytes = 0
        for rank in ranks:
            more = self._nbytes(rank)
            if some and nbytes + more > self._window_bytes:
                yield some
                some, nbytes = [], 0
            some.append(rank)
            nbytes += more
        if some:
            yield some

    def _nbytes(self, rank: int) -> int:
        return sum(self._leaves[n].spec.nbytes for n in self.found[rank].numbers)

    def _read(self, numbers: Sequence[int]) -> list[bytearray]:
        """Return the proven bytes of some leaves."""
        leaves = [self._leaves[number] for number in numbers]
        arrived = [bytearray(leaf.spec.nbytes) for leaf in leaves]
        places, stored = [], []
        for place, leaf in enumerate(leaves):
            array = stored_array(self._reader, self._name, leaf)
            if array.is_whole:
                places.append(place)
                stored.append(array.tiles[0].leaf)
            else:
                whole = Box.whole(leaf.spec.shape)
                read_box(self._reader, array, whole, memoryview(arrived[place]))
        if not stored:
            return arrived
        blocks = proven_blocks(self._reader, stored, window_bytes=self._window_bytes)
        with closing(blocks):
            for block, data in blocks:
                arrived[places[block.leaf]][block.start : block.end] = data
        return arrived


@dataclass(frozen=True, slots=True)
class Deal:
    """What root sends to the ranks for one state.

    Attributes:
        lengths: Bytes for each rank, in rank order.
        turns: Yields some ranks and the part for each of them.
    """

    lengths: Sequence[int]
    turns: Iterator[tuple[Sequence[int], bytes]]

    def counted(self, progress: Progress) -> Iterator[tuple[Sequence[int], bytes]]:
        """Yield the turns, and count the bytes that they send. Not collective."""
        progress.expect(sum(self.lengths))
        for ranks, part in self.turns:
            yield ranks, part
            progress.count(len(ranks) * len(part))


def plan_deals(
    session: Session, found: OpenGeneration, match: StateMatch
) -> Mapping[str, Deal]:
    """Plan, on root alone, which part each rank gets of each state that has parts.

    Not collective. Reads the parts of states that make new parts for another number of
    ranks.

    Raises:
        CorruptGenerationError: On the calling rank, if bytes are not those saved.
        RestoreError: On the calling rank, if a state cannot make parts for so many ranks.
    """
    reader = found.reader
    if reader is None or not session.comm.is_root:
        return {}
    size, window = session.comm.size, session.options.io.window_bytes
    deals = {}
    for matched in match.states:
        state = matched.state
        if isinstance(state, RankedState) and is_dealt(matched, size):
            with concerning(f"state {state.name!r}"):
                deals[state.name] = _plan(reader, state, size, window)
    return deals


def deal_parts(
    session: Session,
    match: StateMatch,
    deals: Mapping[str, Deal],
    traded: Collection[str],
    deferred: Deferred,
    progress: Progress,
) -> StateMatch:
    """Send each rank its parts.

    Collective. Main thread only. Changes no state.

    Args:
        session: The manager's.
        match: The states to restore.
        deals: What `plan_deals` planned, on root; ignored elsewhere.
        traded: Names of states whose parts reach the ranks otherwise.
        deferred: Keeps the error of a part, to be raised before anything is overwritten.
        progress: Counts the bytes that root sends.

    Returns:
        The same states; those with parts are ready to take over this rank's part.

    Raises:
        CorruptGenerationError: On every rank, if bytes are not those saved.
    """
    comm = session.comm
    arrivals: dict[str, Arrival] = {}

    def open_part(matched: MatchedState, part: bytes) -> None:
        arrivals[matched.state.name] = open_dealt_part(matched, part, comm.size)

    for matched in match.states:
        name = matched.state.name
        if name in traded or not _has_parts(matched):
            continue
        deal = deals.get(name)
        part = scatter_bytes(
            comm,
            deal.lengths if deal else (),
            deal.counted(progress) if deal else (),
            f"dealing out the parts of state {name!r}",
            error=RestoreError,
            window_bytes=session.options.io.window_bytes,
        )
        deferred.attempt(partial(open_part, matched, part))
    return match.with_arrivals(arrivals)


def open_dealt_part(matched: MatchedState, part: bytes, size: int) -> Arrival:
    """Return an arrival that takes over this rank's part. Not collective.

    Args:
        matched: The state.
        part: The bytes of `pack`; empty if this rank gets none.
        size: Number of ranks.

    Raises:
        CheckpointError: On the calling rank, as `RankedState.open_part` does.
    """
    state = matched.state
    assert isinstance(state, RankedState)
    count = size if state.resizes else matched.saved.parts or 0
    with concerning(f"state {state.name!r}"):
        return replace(matched.arrival, adopt=state.open_part(part, count))


def is_dealt(matched: MatchedState, size: int) -> bool:
    """Return whether root deals out the parts of a state.

    Not collective. Called on root. Else they lie in files of tiles, and are traded; but if
    the state makes new parts for so many ranks, root reads all of them.
    """
    saved, state = matched.saved, matched.state
    resizes = isinstance(state, RankedState) and state.resizes and saved.parts != size
    return _has_parts(matched) and (resizes or not saved.are_parts_cut)


def ranks_of_parts(state: RankedState, size: int, saved: int) -> dict[int, list[int]]:
    """Return the ranks that get each saved part, in the order of the parts.

    Not collective.

    Args:
        state: The state.
        size: Number of ranks.
        saved: Number of saved parts.
    """
    ranks: dict[int, list[int]] = {}
    for rank in range(size):
        source = state.source(rank, saved)
        if source is not None:
            ranks.setdefault(source, []).append(rank)
    return dict(sorted(ranks.items()))


def _has_parts(matched: MatchedState) -> bool:
    return isinstance(matched.state, RankedState) and matched.saved.parts is not None


def _plan(
    reader: GenerationReader, state: RankedState, size: int, window_bytes: int
) -> Deal:
    parts = SavedParts(reader, state.name, window_bytes // SLOTS)
    saved = len(parts.found)
    if state.resizes and saved != size:
        read = [part for _, part in parts.read(range(saved))]
        made = state.resize(read, size)
        turns = (([rank], part) for rank, part in enumerate(made))
        return Deal([len(part) for part in made], turns)
    ranks_of = ranks_of_parts(state, size, saved)
    sources = list(ranks_of)
    lengths = [0] * size
    for source, length in zip(sources, parts.lengths(sources), strict=True):
        for rank in ranks_of[source]:
            lengths[rank] = length
    return Deal(lengths, ((ranks_of[n], part) for n, part in parts.read(sources)))
