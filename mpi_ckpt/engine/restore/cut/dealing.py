# SPDX-License-Identifier: Apache-2.0
"""Reads and proves the parts of ranks on root, and sends each rank its own part."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, overload

from mpi_ckpt.comm import deal_out
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
    from collections.abc import Collection, Iterator

    from mpi_ckpt.comm import Deferred
    from mpi_ckpt.engine.restore.matching import MatchedState, StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import Progress
    from mpi_ckpt.state import Arrival
    from mpi_ckpt.storage.format.manifest import CutLeaf, StoredLeaf
    from mpi_ckpt.storage.reading.reader import GenerationReader

# Of the structure of a part, about.
_STRUCTURE_BYTES = 2 << 10


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
        self.found = find_parts([leaf.spec.name for leaf in self._leaves])

    def nbytes(self, rank: int) -> int:
        """Return the bytes of a part's leaves, without their structure."""
        return sum(self._leaves[n].spec.nbytes for n in self.found[rank].numbers)

    def read(self, ranks: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield some parts, each with its rank, in the order of the ranks.

        Raises:
            CorruptGenerationError: On the calling rank, if bytes are not those saved.
            ReadError: On the calling rank, if the operating system cannot read them.
        """
        for some in self._windows(ranks):
            heads = self._read_structures(some)
            numbers = [number for rank in some for number in self.found[rank].numbers]
            data = iter(self._read(numbers))
            for rank in some:
                mine = [next(data) for _ in self.found[rank].numbers]
                yield rank, b"".join([heads.pop(rank), *mine])

    def _read_structures(self, ranks: Sequence[int]) -> dict[int, bytes]:
        """Return what comes before the leaves of some parts."""
        heads = dict.fromkeys(ranks, b"")
        structures = {
            rank: structure
            for rank in ranks
            if (structure := self.found[rank].structure) is not None
        }
        texts = self._read(list(structures.values()))
        for rank, text in zip(structures, texts, strict=True):
            part = self.found[rank]
            specs = [self._leaves[number].spec for number in part.numbers]
            heads[rank] = packed_head(bytes(text), specs, part.names)
        return heads

    def _windows(self, ranks: Sequence[int]) -> Iterator[list[int]]:
        """Yield runs of ranks whose parts fit into a window together."""
        some: list[int] = []
        nbytes = 0
        for rank in ranks:
            more = self.nbytes(rank) + _STRUCTURE_BYTES
            if some and nbytes + more > self._window_bytes:
                yield some
                some, nbytes = [], 0
            some.append(rank)
            nbytes += more
        if some:
            yield some

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


class LazyParts(Sequence[bytes]):
    """The saved parts of a state in rank order, each read when it is asked for."""

    def __init__(self, parts: SavedParts) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts.found)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        ranks = range(len(self))[index]
        if isinstance(ranks, range):
            return [part for _, part in self._parts.read(ranks)]
        ((_, part),) = self._parts.read([ranks])
        return part

    def __iter__(self) -> Iterator[bytes]:
        return (part for _, part in self._parts.read(range(len(self))))


def deal_parts(
    session: Session,
    found: OpenGeneration,
    match: StateMatch,
    traded: Collection[str],
    deferred: Deferred,
    progress: Progress,
) -> StateMatch:
    """Send each rank its parts.

    Collective. Main thread only. Changes no state.

    Args:
        session: The manager's.
        found: The generation; root reads it.
        match: The states to restore.
        traded: Names of states whose parts reach the ranks otherwise.
        deferred: Keeps the error of a part, to be raised before anything is overwritten.
        progress: Counts the bytes that root sends.

    Returns:
        The same states; those with parts are ready to take over this rank's part.

    Raises:
        CorruptGenerationError: On every rank, if bytes are not those saved.
        RestoreError: On every rank, if a state cannot make parts for so many ranks.
    """
    comm = session.comm
    arrivals: dict[str, Arrival] = {}

    def open_part(matched: MatchedState, part: bytes) -> None:
        arrivals[matched.state.name] = open_dealt_part(matched, part, comm.size)

    for matched in match.states:
        name = matched.state.name
        if name in traded or not _has_parts(matched):
            continue
        part = deal_out(
            comm,
            _turns(session, found, matched, progress) if comm.is_root else (),
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


def _turns(
    session: Session, found: OpenGeneration, matched: MatchedState, progress: Progress
) -> Iterator[tuple[Sequence[int], bytes]]:
    """Yield some ranks and the part for each of them, on root, and count what they get.

    Raises:
        CorruptGenerationError: On the calling rank, if bytes are not those saved.
        RestoreError: On the calling rank, if the state cannot make parts for so many ranks.
    """
    state, size = matched.state, session.comm.size
    assert isinstance(state, RankedState)
    assert found.reader is not None
    with concerning(f"state {state.name!r}"):
        window_bytes = session.options.io.window_bytes // SLOTS
        parts = SavedParts(found.reader, state.name, window_bytes)
        saved = len(parts.found)
        if state.resizes and saved != size:
            for rank, part in enumerate(state.resize(LazyParts(parts), size)):
                progress.expect(len(part))
                yield [rank], part
                progress.count(len(part))
            return
        ranks_of = ranks_of_parts(state, size, saved)
        progress.expect(sum(len(ranks) * parts.nbytes(n) for n, ranks in ranks_of.items()))
        for source, part in parts.read(list(ranks_of)):
            yield ranks_of[source], part
            progress.count(len(ranks_of[source]) * parts.nbytes(source))
