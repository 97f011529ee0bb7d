# SPDX-License-Identifier: Apache-2.0
"""Moves saved bytes from files, or from memory, to their destinations on every rank."""

from __future__ import annotations

from contextlib import closing
from functools import cached_property, partial
from typing import TYPE_CHECKING

from mpi_ckpt.comm import UNTOUCHED, agree, any_of, bcast_buffers
from mpi_ckpt.digest import Digest
from mpi_ckpt.engine.restore.matching import OVERWRITTEN
from mpi_ckpt.engine.sync.sending import send_leaves
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaf import Leaf, MemoryBuffer, Target, copy_bytes
from mpi_ckpt.storage.reading.proving import proven_windows
from mpi_ckpt.storage.reading.read_plan import plan_reads

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from mpi_ckpt.comm import Deferred
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.memory import MemoryCopy
    from mpi_ckpt.storage.format.manifest import StoredLeaf
    from mpi_ckpt.storage.reading.read_plan import DigestBlock, Window

_COPYING = "bringing back a copy in memory"


def transfer_files(
    session: Session, found: OpenGeneration, match: StateMatch, deferred: Deferred
) -> bool:
    """Read, prove, broadcast and store bytes: a window at a time, the readers in turn.

    Collective. Main thread only. No byte is sent or stored before its block was proven.
    Files are read once, whatever the number of ranks. Each window is read while the
    previous one is proven and sent.

    Args:
        session: The manager's.
        found: The generation, open on the ranks that read.
        match: The destinations, in the same order on every rank.
        deferred: Keeps failures to store bytes, for the next meeting.

    Returns:
        Whether states in memory were changed; the same on every rank.

    Raises:
        CorruptGenerationError: On every rank, if bytes are not those saved.
        ReadError: On every rank, if a reading rank cannot read.
    """
    comm, outline = session.comm, found.outline
    targets = [
        Target(spec, leaf) for spec, leaf in zip(match.specs, match.leaves, strict=True)
    ]
    windows = plan_reads(
        match.extents,
        outline.files,
        block_bytes=outline.block_bytes,
        window_bytes=session.options.io.window_bytes // 2,
    )
    turns = found.sources(windows)
    mine = [
        window for window, rank in zip(windows, turns, strict=True) if rank == comm.rank
    ]
    with closing(_read(found, match, mine)) as proven:
        for turn, (window, source) in enumerate(zip(windows, turns, strict=True)):
            groups = window.groups()

            def read(
                window: Window = window,
                groups: Sequence[Sequence[DigestBlock]] = groups,
                source: int = source,
            ) -> list[memoryview]:
                deferred.raise_failure()
                if source != comm.rank:
                    return [_room(group, targets) for group in groups]
                return _cut(window, groups, next(proven))

            buffers = agree(
                comm,
                "reading a generation",
                read,
                error=RestoreError,
                safe=OVERWRITTEN if turn else UNTOUCHED,
            )
            bcast_buffers(comm, buffers, "sending a generation", source)
            is_mine = source == comm.rank
            deferred.attempt(
                partial(_place, match, targets, groups, buffers, is_mine=is_mine)
            )
    return bool(windows)


def transfer_copy(
    session: Session, copy: MemoryCopy | None, match: StateMatch, deferred: Deferred
) -> None:
    """Restore a copy in memory: each rank its own, or root's if the rank has none.

    Collective. Main thread only.

    Args:
        session: The manager's.
        copy: This rank's copy, of the same form as root's; None if it holds none.
        match: The destinations, in the same order on every rank.
        deferred: Keeps failures to store bytes, for the next meeting.

    Raises:
        RestoreError: On every rank, if any rank cannot store bytes.
    """
    comm = session.comm
    sources = _copied_leaves(copy, match)

    def put() -> None:
        for source, leaf in zip(sources, match.leaves, strict=copy is not None):
            if leaf is not None:
                leaf.buffer.write(source)

    agree(comm, _COPYING, put, error=RestoreError)
    (lacking,) = any_of(comm, _COPYING, copy is None)
    if not lacking:
        return
    # Root sends from the copy, since a leaf that root's program lacks is nowhere else.
    if comm.is_root:
        sent = [
            Leaf(spec, MemoryBuffer(source))
            for spec, source in zip(match.specs, sources, strict=True)
        ]
    else:
        sent = [
            leaf or Leaf(spec, MemoryBuffer.empty(spec.nbytes))
            for spec, leaf in zip(match.specs, match.leaves, strict=True)
        ]
    send_leaves(comm, sent, session.options.io.window_bytes, deferred)


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
    def _stored(self) -> list[StoredLeaf]:
        return _stored_leaves(self._found, self._match)

    @cached_property
    def _copies(self) -> list[memoryview]:
        return _copied_leaves(self._found.copy, self._match)


def _stored_leaves(found: OpenGeneration, match: StateMatch) -> list[StoredLeaf]:
    assert found.reader is not None
    leaves: list[StoredLeaf] = []
    for matched in match.states:
        stored = found.reader.manifest.state(matched.saved.name)
        if not matched.saved.extents or stored is None:
            continue
        specs = matched.saved.specs
        if len(specs) == len(stored.leaves):
            leaves += stored.leaves
            continue
        names = {spec.name for spec in specs}  # some leaves are traded
        leaves += [leaf for leaf in stored.leaves if leaf.spec.name in names]
    return leaves


def _copied_leaves(copy: MemoryCopy | None, match: StateMatch) -> list[memoryview]:
    held = {} if copy is None else copy.leaves
    return [data for matched in match.states for data in held.get(matched.saved.name, ())]


def _read(
    found: OpenGeneration, match: StateMatch, windows: Sequence[Window]
) -> Generator[memoryview]:
    """Yield the proven bytes of the windows that this rank reads."""
    if found.reader is not None:
        yield from proven_windows(found.reader, _stored_leaves(found, match), windows)


def _cut(
    window: Window, groups: Sequence[Sequence[DigestBlock]], data: memoryview
) -> list[memoryview]:
    """Return the messages into which the bytes of a window are cut."""
    start = window.start
    return [data[group[0].offset - start : _end(group) - start] for group in groups]


def _end(group: Sequence[DigestBlock]) -> int:
    return group[-1].offset + group[-1].nbytes


def _room(group: Sequence[DigestBlock], targets: Sequence[Target]) -> memoryview:
    """Return memory to receive blocks: the destination itself, if it is one block."""
    if len(group) > 1:
        return memoryview(bytearray(_end(group) - group[0].offset))
    (block,) = group
    return targets[block.leaf].memory()[block.start : block.end]


def _place(
    match: StateMatch,
    targets: Sequence[Target],
    groups: Sequence[Sequence[DigestBlock]],
    buffers: Sequence[memoryview],
    *,
    is_mine: bool,
) -> None:
    """Store arrived blocks in their destinations on this rank."""
    leaf = 0
    try:
        for group, buffer in zip(groups, buffers, strict=True):
            first = group[0].offset
            is_there = not is_mine and len(group) == 1
            for leaf, _, start, end, offset, is_last in group:
                if not is_there:
                    at = offset - first
                    data = buffer[at : at + end - start]
                    copy_bytes(data, targets[leaf].memory()[start:end])
                if is_last:
                    targets[leaf].finish()
    except Exception:
        with concerning(match.name_of(leaf)):
            raise
