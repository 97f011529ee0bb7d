# SPDX-License-Identifier: Apache-2.0
"""Brings the windows of a restore from the rank that has read them to all ranks.

Through memory that the ranks of a host share, if they do; else by broadcast.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from mpi_ckpt.comm import bcast_buffers
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.buckets import write_leaves
from mpi_ckpt.leaves.target import Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.restore.host_memory import HostMemory
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.storage.reading.read_plan import DigestBlock, Window

_START, _IS_LAST = attrgetter("start"), attrgetter("is_last")
_SENDING = "sending a generation"

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

    def store(self, blocks: Sequence[DigestBlock], data: memoryview | None) -> None:
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

    def _store_small(self, blocks: Sequence[DigestBlock], data: memoryview) -> bool:
        """Store blocks if all are small leaves without a gap; return whether they are."""
        leaves = [self._leaves[block.leaf] for block in blocks]
        sizes = [block.end for block in blocks]
        is_whole = all(map(_IS_LAST, blocks)) and not any(map(_START, blocks))
        is_dense = blocks[-1].offset + sizes[-1] - blocks[0].offset == sum(sizes)
        if not (is_whole and is_dense) or max(sizes) > _SMALL_BYTES or None in leaves:
            return False
        try:
            write_leaves([leaf for leaf in leaves if leaf], data[: sum(sizes)])
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
        """Let the ranks of this host know that it is proven. Not collective."""
        if proven is not None:
            self._memory.announce(turn)
        else:
            self._memory.look_for(turn)

    def send(self, turn: int) -> None:
        """Bring the window to the other hosts. Collective."""
        self._data = self._memory.deliver(turn, _SENDING)

    def store(self, turn: int) -> None:
        """Copy the window. Not collective."""
        self._places.store(self._windows[turn].blocks, self._data)
        self._memory.forget(turn)


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
        self._groups: list[list[DigestBlock]] = []
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

    def _place(self, group: Sequence[DigestBlock]) -> memoryview | None:
        """Return the destination of blocks, if it is one block that arrives there."""
        return self._places.memory(group[0]) if len(group) == 1 else None


def _room(group: Sequence[DigestBlock]) -> memoryview:
    """Return memory to receive blocks."""
    return memoryview(bytearray(_end(group) - group[0].offset))


def _end(group: Sequence[DigestBlock]) -> int:
    return group[-1].offset + group[-1].nbytes
