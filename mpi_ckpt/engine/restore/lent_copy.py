# SPDX-License-Identifier: Apache-2.0
"""Lets ranks on root's host map root's copy of the states, instead of being sent it."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import bcast_bytes
from mpi_ckpt.memory import SharedMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.memory import Memory

_DOING = "lending a copy in memory"

# So much of a copy may lie elsewhere, and is sent.
_LOOSE_BYTES_MAX = 16 << 20
_NOTHING = "null"


@dataclass(frozen=True, slots=True)
class LentCopy:
    """Where root's copy lies in memory that other processes can map.

    Attributes:
        descriptor: Of the memory, in root's process.
        inode: A number that only this memory has.
        nbytes: Length of the memory.
        starts: Offset of each leaf; -1 for one that lies elsewhere.
        sizes: Length of each leaf.
        loose: The bytes of the leaves that lie elsewhere.
    """

    descriptor: int
    inode: int
    nbytes: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    loose: bytes

    @classmethod
    def offer(
        cls, comm: Communicator, memory: Memory | None, leaves: Sequence[memoryview]
    ) -> LentCopy | None:
        """Return root's offer, None if it makes none. Collective. Main thread only.

        Args:
            comm: The communicator.
            memory: The memory of this rank.
            leaves: The leaves of the copy; used on root only.
        """
        offer = None
        if comm.is_root and memory is not None and memory.arena.shared is not None:
            offer = cls._of(memory.arena.shared, leaves)
        words = _NOTHING.encode() if offer is None else offer.encode()
        return cls.decode(bcast_bytes(comm, words if comm.is_root else None, _DOING))

    @classmethod
    def _of(cls, shared: SharedMemory, leaves: Sequence[memoryview]) -> LentCopy | None:
        base, nbytes = _address(shared.view), shared.view.nbytes
        starts, loose = [], []
        for leaf in leaves:
            start = _address(leaf) - base if leaf.nbytes else 0
            if not 0 <= start <= nbytes - leaf.nbytes:
                start = -1
                loose.append(leaf)
            starts.append(start)
        if sum(leaf.nbytes for leaf in loose) > _LOOSE_BYTES_MAX:
            return None
        return cls(
            shared.descriptor,
            shared.inode,
            nbytes,
            tuple(starts),
            tuple(leaf.nbytes for leaf in leaves),
            b"".join(loose),
        )

    def encode(self) -> bytes:
        """Return the offer as bytes. Not collective."""
        head = [self.descriptor, self.inode, self.nbytes, self.starts, self.sizes]
        return json.dumps(head).encode() + b"\n" + self.loose

    @classmethod
    def decode(cls, data: bytes) -> LentCopy | None:
        """Return the offer that `encode` has encoded; None for none. Not collective."""
        head, _, loose = data.partition(b"\n")
        if (words := json.loads(head)) is None:
            return None
        descriptor, inode, nbytes, starts, sizes = words
        return cls(descriptor, inode, nbytes, tuple(starts), tuple(sizes), loose)

    def take(self, comm: Communicator) -> list[memoryview] | None:
        """Return the leaves, mapped; None if this rank cannot map them. Not collective.

        They stay as they are until root makes another copy. Each rank drops or replaces its
        own before it does; if root is lost, they stay.
        """
        owner = comm.visible.get(comm.root)
        if owner is None:
            return None
        try:
            shared = SharedMemory.attach(
                owner.process, self.descriptor, self.nbytes, mmap.ACCESS_COPY
            )
        except (OSError, ValueError):
            return None
        is_it = shared.inode == self.inode
        shared.close()
        return self._leaves(shared.view) if is_it else None

    def _leaves(self, memory: memoryview) -> list[memoryview]:
        loose, leaves = memoryview(bytearray(self.loose)), []
        for start, size in zip(self.starts, self.sizes, strict=True):
            if start < 0:
                leaves.append(loose[:size])
                loose = loose[size:]
            else:
                leaves.append(memory[start : start + size])
        return leaves


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)
