# SPDX-License-Identifier: Apache-2.0
"""Moves saved bytes from files to their destinations on every rank."""

from __future__ import annotations

from contextlib import closing
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import UNTOUCHED, agree
from mpi_ckpt.engine.restore.from_memory import copied_leaves
from mpi_ckpt.engine.restore.host_memory import HostMemory
from mpi_ckpt.engine.restore.matching import OVERWRITTEN
from mpi_ckpt.engine.restore.transport import Destinations, SentTransport, SharedTransport
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.leaves.digest import Digest
from mpi_ckpt.storage.format.manifest import StoredLeaves
from mpi_ckpt.storage.reading.proving import read_proven, take_proven
from mpi_ckpt.storage.reading.read_plan import plan_reads
from mpi_ckpt.storage.reading.read_queue import SLOTS, Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Deferred
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.restore.transport import Transport
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import Progress
    from mpi_ckpt.storage.reading.proving import Refusal
    from mpi_ckpt.storage.reading.read_plan import Window
    from mpi_ckpt.storage.reading.read_queue import ReadQueue


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
    memory = HostMemory.of(comm, windows, readers, slots)
    with closing(_OwnWindows(found, match, mine)) as reads:
        # A rank that raised here would leave the others waiting.
        deferred.attempt(partial(reads.start, slots, memory))
        if memory is not None and memory.share():
            transport = SharedTransport(memory, windows, places)
        for turn, reader in enumerate(readers):

            def read(turn: int = turn, reader: int = reader) -> None:
                deferred.raise_failure()
                transport.prepare(turn, reads.take() if reader == comm.rank else None)

            agree(
                comm,
                "reading a generation",
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

    def start(self, slots: Slots, memory: HostMemory | None) -> None:
        """Start to read, into the memory of the host if there is any."""
        reader = self._found.reader
        if reader is None or not self._windows:
            return
        leaves = _stored_leaves(self._found, self._match)
        room = None if memory is None else memory.memory
        self._queue = read_proven(reader, leaves, self._windows, slots, room)

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
