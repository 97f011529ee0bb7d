# SPDX-License-Identifier: Apache-2.0
"""Brings saved bytes from files, or from memory, to where they belong on every rank."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, any_of, bcast_buffers
from mpi_ckpt.engine.restore.matching import OVERWRITTEN
from mpi_ckpt.engine.sync.sending import send_leaves
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.leaf import Leaf, MemoryBuffer, Target, copy_bytes
from mpi_ckpt.storage.proving import proven_windows
from mpi_ckpt.storage.read_plan import plan_reads

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.memory import MemoryCopy
    from mpi_ckpt.storage.read_plan import Block, Window

__all__ = ["transfer_copy", "transfer_files"]

_COPYING = "bringing back a copy in memory"


def transfer_files(session: Session, found: OpenGeneration, match: StateMatch) -> None:
    """Read, prove, broadcast, put in place: a window at a time, the readers in turn.

    Collective. Main thread only. No byte is sent or put in place before its block was
    proven. Files are read once, whatever the number of ranks, each window while the one
    before it is proven and sent.

    Args:
        session: The manager's.
        found: The generation, open on the ranks that read.
        match: Where everything goes, in the same order on every rank.

    Raises:
        CorruptGenerationError: On every rank, if bytes are not those that were saved.
        ReadError: On every rank, if one that reads cannot.
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
    turns = [found.readers[turn % len(found.readers)] for turn in range(len(windows))]
    mine = [one for one, rank in zip(windows, turns, strict=True) if rank == comm.rank]
    with closing(_read(found, match, mine)) as proven:
        for window, source in zip(windows, turns, strict=True):

            def read(source: int = source) -> memoryview | None:
                return next(proven) if source == comm.rank else None

            data = agree(
                comm, "reading a generation", read, error=RestoreError, safe=OVERWRITTEN
            )
            _distribute(comm, window, data, targets, source)


def transfer_copy(session: Session, copy: MemoryCopy | None, match: StateMatch) -> None:
    """Put a copy in memory back: each rank its own, or root's where one has none.

    Collective. Main thread only.

    Args:
        session: The manager's.
        copy: This rank's, of the same form as root's; None if it holds none.
        match: Where everything goes, in the same order on every rank.

    Raises:
        RestoreError: On every rank, if bytes cannot be put in place on any.
    """
    comm = session.comm
    held = {} if copy is None else copy.leaves
    sources = [data for one in match.states for data in held.get(one.saved.name, ())]

    def put() -> None:
        for source, leaf in zip(sources, match.leaves, strict=copy is not None):
            if leaf is not None:
                leaf.buffer.write(source)

    agree(comm, _COPYING, put, error=RestoreError)
    (lacking,) = any_of(comm, _COPYING, copy is None)
    if not lacking:
        return
    # Root's own are sent from the copy, as a leaf that root has no use for is nowhere else.
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
    send_leaves(comm, sent, session.options.io.window_bytes)


def _read(
    found: OpenGeneration, match: StateMatch, windows: Sequence[Window]
) -> Generator[memoryview]:
    """Give the proven bytes of the windows that this rank reads."""
    if found.reader is None:
        return
    manifest = found.reader.manifest
    stored = [manifest.state(one.saved.name) for one in match.states if one.saved.extents]
    leaves = [leaf for state in stored if state for leaf in state.leaves]
    yield from proven_windows(found.reader, leaves, windows)


def _distribute(
    comm: Communicator,
    window: Window,
    data: memoryview | None,
    targets: Sequence[Target],
    source: int,
) -> None:
    """Send the blocks of a window from who read it to where they belong on every rank."""
    groups = window.groups()
    if data is None:
        buffers = [_room(group, targets) for group in groups]
    else:
        start = window.start
        spans = [(group[0].offset - start, _end(group) - start) for group in groups]
        buffers = [data[first:last] for first, last in spans]
    bcast_buffers(comm, buffers, "sending a generation", source)
    for group, buffer in zip(groups, buffers, strict=True):
        if data is not None or len(group) > 1:
            _place(group, buffer, targets)
    for block in window.blocks:
        if block.is_last:
            targets[block.leaf].finish()


def _end(group: Sequence[Block]) -> int:
    return group[-1].offset + group[-1].nbytes


def _room(group: Sequence[Block], targets: Sequence[Target]) -> memoryview:
    """Return memory for blocks to arrive in: where it belongs, if it is one block."""
    if len(group) > 1:
        return memoryview(bytearray(_end(group) - group[0].offset))
    (block,) = group
    return targets[block.leaf].memory()[block.start : block.end]


def _place(group: Sequence[Block], data: memoryview, targets: Sequence[Target]) -> None:
    first = group[0].offset
    for leaf, _, start, end, offset, _ in group:
        at = offset - first
        copy_bytes(data[at : at + end - start], targets[leaf].memory()[start:end])
