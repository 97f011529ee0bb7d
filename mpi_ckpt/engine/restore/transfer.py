# SPDX-License-Identifier: Apache-2.0
"""Moves saved bytes from files, by windows, to their destinations on every rank."""

from __future__ import annotations

from contextlib import closing
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mpi_ckpt.comm import UNTOUCHED, agree, bcast_buffers, meet
from mpi_ckpt.engine.restore.from_memory import copied_leaves
from mpi_ckpt.engine.restore.host_memory import HostMemory
from mpi_ckpt.engine.restore.matching import OVERWRITTEN
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.buckets import write_leaves
from mpi_ckpt.leaves.digest import Digest
from mpi_ckpt.leaves.target import Target
from mpi_ckpt.storage.format.manifest import StoredLeaves
from mpi_ckpt.storage.reading.proving import read_proven, take_proven
from mpi_ckpt.storage.reading.read_plan import plan_reads
from mpi_ckpt.storage.reading.read_queue import SLOTS, Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator, Deferred
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import Progress
    from mpi_ckpt.storage.reading.proving import Refusal
    from mpi_ckpt.storage.reading.read_plan import Blocks, DigestBlock, Window
    from mpi_ckpt.storage.reading.read_queue import ReadQueue


_READING, _SENDING = "reading a generation", "sending a generation"

# How many windows ranks of one host store between two meetings.
_MEETING_WINDOWS = 8

# Smaller leaves are stored many at a time.
_SMALL_BYTES = 64 << 10


class Destinations:
    """The memory of this rank for all leaves of a restore.

    Not collective. Not thread-safe.

    Args:
        match: The states to restore.
    """

    def __init__(self, match: StateMatch) -> None:
        self._match = match
        self._specs, self._leaves = match.specs, match.leaves
        self._targets: dict[int, Target] = {}

    def memory(self, block: DigestBlock) -> memoryview | None:
        """Return the memory of a block; None if its bytes can only be stored."""
        target = self._target(block.leaf)
        return None if target.takes_parts else target.memory()[block.start : block.end]

    def _target(self, leaf: int) -> Target:
        if leaf not in self._targets:
            self._targets[leaf] = Target(self._specs[leaf], self._leaves[leaf])
        return self._targets[leaf]

    def store(self, blocks: Blocks, data: memoryview | None) -> None:
        """Store blocks that follow one another in a file, and the leaves that they end.

        Args:
            blocks: The blocks.
            data: Their bytes, with what is between them; None if they are in their memory.
        """
        leaf, first = 0, blocks[0].offset
        if data is not None and self._store_small(blocks, data):
            return
        try:
            for leaf, _, start, end, offset, is_last in blocks:
                if data is not None:
                    at = offset - first
                    self._target(leaf).put(start, data[at : at + end - start])
                if is_last:
                    self._target(leaf).finish()
        except Exception:
            with concerning(self._match.name_of(leaf)):
                raise

    def _store_small(self, blocks: Blocks, data: memoryview) -> bool:
        """Store blocks if all are small leaves without a gap; return whether they are."""
        if not blocks.are_leaves:
            return False
        starts, ends = blocks.runs()
        is_dense = (starts[1:] == ends[:-1]).all()
        if not is_dense or (ends - starts).max() > _SMALL_BYTES:
            return False
        leaves = list(filter(None, map(self._leaves.__getitem__, blocks.leaves)))
        if len(leaves) < len(blocks):
            return False
        try:
            write_leaves(leaves, data[: ends[-1] - starts[0]])
        except Exception:
            return False
        return True


class Transport(Protocol):
    """Brings windows to all ranks, in their order. Main thread only."""

    def prepare(self, turn: int, proven: memoryview | None) -> None:
        """Prepare to send a window; may fail on any rank. Not collective.

        Args:
            turn: Number of the window.
            proven: Its bytes on the rank that has read it, None elsewhere.
        """

    def send(self, turn: int) -> None:
        """Bring the window to all ranks. Collective.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """

    def store(self, turn: int) -> None:
        """Put the window into its destinations; may fail on any rank. Not collective."""


class SharedTransport:
    """A `Transport` in which each rank copies from the memory of its host.

    Args:
        memory: The memory, seen by all ranks of each host.
        windows: All windows.
        places: The destinations on this rank.
    """

    def __init__(
        self, memory: HostMemory, windows: Sequence[Window], places: Destinations
    ) -> None:
        self._memory = memory
        self._windows = windows
        self._places = places
        self._data = memoryview(b"")

    def prepare(self, turn: int, proven: memoryview | None) -> None:
        """Put the window where the ranks of this host see it. Not collective."""
        if proven is not None:
            self._memory.put(turn, proven)
        else:
            self._memory.look_for(turn)

    def send(self, turn: int) -> None:
        """Bring the window to the other hosts. Collective."""
        self._data = self._memory.deliver(turn, _SENDING)

    def store(self, turn: int) -> None:
        """Copy the window. Not collective."""
        self._places.store(self._windows[turn].blocks, self._data)


class SentTransport:
    """A `Transport` in which the rank that reads a window sends it to each rank.

    Large blocks arrive in their destinations; small ones are sent together, and copied.

    Args:
        comm: The communicator.
        windows: All windows.
        readers: The rank that reads each window.
        places: The destinations on this rank.
    """

    def __init__(
        self,
        comm: Communicator,
        windows: Sequence[Window],
        readers: Sequence[int],
        places: Destinations,
    ) -> None:
        self._comm = comm
        self._windows = windows
        self._readers = readers
        self._places = places
        self._groups: list[Blocks] = []
        self._buffers: list[memoryview] = []
        self._arrives: list[bool] = []

    def prepare(self, turn: int, proven: memoryview | None) -> None:
        """Find the memory that is sent, or received into. Not collective."""
        window = self._windows[turn]
        self._groups = window.groups()
        if proven is None:
            places = [self._place(group) for group in self._groups]
            self._arrives = [place is not None for place in places]
            self._buffers = [
                place if place is not None else _room(group)
                for group, place in zip(self._groups, places, strict=True)
            ]
            return
        start = window.start
        self._arrives = [False] * len(self._groups)
        self._buffers = [
            proven[group[0].offset - start : _end(group) - start] for group in self._groups
        ]

    def send(self, turn: int) -> None:
        """Broadcast the window. Collective."""
        bcast_buffers(self._comm, self._buffers, _SENDING, self._readers[turn])

    def store(self, turn: int) -> None:  # noqa: ARG002 (the window prepared last)
        """Copy what has not arrived in its destination. Not collective."""
        received = zip(self._groups, self._buffers, self._arrives, strict=True)
        for group, data, arrives in received:
            self._places.store(group, None if arrives else data)

    def _place(self, group: Blocks) -> memoryview | None:
        """Return the destination of blocks, if it is one block that arrives there."""
        return self._places.memory(group[0]) if len(group) == 1 else None


def _room(group: Blocks) -> memoryview:
    """Return memory to receive blocks."""
    return memoryview(bytearray(_end(group) - group[0].offset))


def _end(group: Blocks) -> int:
    return group[-1].offset + group[-1].nbytes


def transfer_files(
    session: Session,
    found: OpenGeneration,
    match: StateMatch,
    deferred: Deferred,
    progress: Progress,
) -> bool:
    """Read, prove, send and store bytes: a window at a time, the readers in turn.

    Collective. Main thread only. No byte is sent or stored before its block was proven.
    Files are read once, whatever the number of ranks. The next windows are read and proven
    while one is sent and stored.

    Args:
        session: The manager's.
        found: The generation, open on the ranks that read.
        match: The destinations, in the same order on every rank.
        deferred: Keeps failures to store bytes, for the next meeting.
        progress: Counts the bytes that were read, by all ranks.

    Returns:
        Whether states in memory were changed; the same on every rank.

    Raises:
        CorruptGenerationError: On every rank, if bytes are not those saved.
        ReadError: On every rank, if a reading rank cannot read.
    """
    comm, outline = session.comm, found.outline
    windows = plan_reads(
        match.extents,
        outline.files,
        block_bytes=outline.block_bytes,
        window_bytes=session.options.io.window_bytes // SLOTS,
    )
    readers = list(found.sources(windows))
    places = Destinations(match)
    transport: Transport = SentTransport(comm, windows, readers, places)
    mine = [
        window for window, rank in zip(windows, readers, strict=True) if rank == comm.rank
    ]
    progress.expect(sum(window.end - window.start for window in windows))
    slots = Slots.of(windows, session.options.io.window_bytes)
    memory = HostMemory.of(comm, windows, readers)
    with closing(_OwnWindows(found, match, mine)) as reads:
        # A rank that raised here would leave the others waiting.
        deferred.attempt(partial(reads.start, slots))
        if memory is not None and memory.share():
            if memory.needs_no_meetings:
                passage = _HostPassage(memory, windows, places, reads, progress)

                def begin() -> bool:
                    deferred.raise_failure()
                    return passage.put_until(1)

                agree(comm, _READING, begin, error=RestoreError)
                _copy_on_host(comm, passage, len(windows))
                return True
            transport = SharedTransport(memory, windows, places)
        for turn, reader in enumerate(readers):

            def read(turn: int = turn, reader: int = reader) -> None:
                deferred.raise_failure()
                transport.prepare(turn, reads.take() if reader == comm.rank else None)

            agree(
                comm,
                _READING,
                read,
                error=RestoreError,
                safe=OVERWRITTEN if turn else UNTOUCHED,
            )
            # INVARIANT: here every rank has stored the windows before this one.
            reads.release()
            transport.send(turn)
            deferred.attempt(partial(transport.store, turn))
            progress.count(windows[turn].end - windows[turn].start)
    return bool(windows)


class _HostPassage:
    """The way of this rank through the windows that its host shares. Not collective.

    Args:
        memory: The memory of the only host.
        windows: All windows.
        places: The destinations on this rank.
        reads: Reads all windows, on the rank that reads.
        progress: Counts the bytes that this rank has stored.
    """

    def __init__(
        self,
        memory: HostMemory,
        windows: Sequence[Window],
        places: Destinations,
        reads: _OwnWindows,
        progress: Progress,
    ) -> None:
        self._memory = memory
        self._windows = windows
        self._places = places
        self._reads = reads
        self._progress = progress
        self._put = self._stored = 0

    def put_until(self, end: int) -> bool:
        """Put windows there, on the rank that reads; return whether all before one are."""
        end = min(end, len(self._windows))
        while self._reads.is_reader and self._put < end:
            if not self._memory.has_place_for(self._put):
                return False
            self._memory.put(self._put, self._reads.take())
            self._reads.release()
            self._put += 1
        return True

    def store_until(self, end: int) -> bool:
        """Store windows as they come; return whether all before one are stored."""
        while self._stored < end:
            number, window = self._stored, self._windows[self._stored]
            # While this rank stores a window, the others find the next one.
            if not (self.put_until(number + 2) and self._memory.look_for(number)):
                return False
            self._places.store(window.blocks, self._memory.window(number))
            self._memory.note_stored(number)
            self._progress.count(window.end - window.start)
            self._stored += 1
        return True


def _copy_on_host(comm: Communicator, passage: _HostPassage, windows: int) -> None:
    """Let the ranks of the only host copy windows as they come. Collective.

    They meet after several windows, and when one has waited for another for long: if that
    has failed, all raise; if it is slow, each goes on where it was.

    Args:
        comm: The communicator.
        passage: This rank's.
        windows: Number of windows.
    """
    for end in range(_MEETING_WINDOWS, windows + _MEETING_WINDOWS, _MEETING_WINDOWS):
        is_behind = True
        while is_behind:
            is_behind = meet(
                comm,
                _READING,
                partial(passage.store_until, min(end, windows)),
                error=RestoreError,
                safe=OVERWRITTEN,
                flag=lambda is_through: not is_through,
            ).is_flagged


class SavedBytes:
    """The bytes that will arrive for each leaf, on root, before they arrive.

    Not collective.

    Args:
        found: The generation or the copy.
        match: The destinations.
    """

    def __init__(self, found: OpenGeneration, match: StateMatch) -> None:
        self._found, self._match = found, match

    def bytes_of(self, index: int) -> memoryview:
        """Return the bytes of a leaf.

        Raises:
            CorruptGenerationError: On the calling rank, if the bytes are not those saved.
        """
        reader = self._found.reader
        if reader is None:
            return self._copies[index]
        leaf = self._stored[index]
        blocks = [reader.read_block(leaf, n) for n in range(len(leaf.digest.blocks))]
        return memoryview(b"".join(blocks))

    def digest_of(self, index: int) -> bytes:
        """Return the digest of the bytes of a leaf."""
        if self._found.reader is None:
            return Digest.of(self._copies[index]).whole
        return self._stored[index].digest.whole

    @cached_property
    def _stored(self) -> StoredLeaves:
        return _stored_leaves(self._found, self._match)

    @cached_property
    def _copies(self) -> list[memoryview]:
        return copied_leaves(self._found.copy, self._match)


def _stored_leaves(found: OpenGeneration, match: StateMatch) -> StoredLeaves:
    assert found.reader is not None
    parts: list[StoredLeaves] = []
    for matched in match.states:
        stored = found.reader.manifest.state(matched.saved.name)
        if not matched.saved.extents or stored is None:
            continue
        leaves, specs = stored.leaves, matched.saved.specs
        if len(specs) < len(leaves):
            names = {spec.name for spec in specs}  # some leaves are traded
            wanted = [n for n, name in enumerate(leaves.form.names) if name in names]
            leaves = leaves.pick(np.array(wanted, np.int64))
        parts.append(leaves)
    return StoredLeaves.chained(parts)


class _OwnWindows:
    """The windows that this rank reads, which may be none.

    Not collective. Main thread only.
    """

    def __init__(
        self, found: OpenGeneration, match: StateMatch, windows: Sequence[Window]
    ) -> None:
        self._found = found
        self._match = match
        self._windows = windows
        self._queue: ReadQueue[list[Refusal]] | None = None

    @property
    def is_reader(self) -> bool:
        """Whether this rank reads any."""
        return bool(self._windows)

    def start(self, slots: Slots) -> None:
        """Start to read."""
        reader = self._found.reader
        if reader is None or not self._windows:
            return
        leaves = _stored_leaves(self._found, self._match)
        self._queue = read_proven(reader, leaves, self._windows, slots)

    def take(self) -> memoryview:
        """Return the bytes of the next window; errors are those of `take_proven`."""
        assert self._queue is not None
        return take_proven(self._queue)

    def release(self) -> None:
        """Let later windows overwrite those taken before the last."""
        if self._queue is not None:
            self._queue.release()

    def close(self) -> None:
        """End the reads."""
        if self._queue is not None:
            self._queue.close()
