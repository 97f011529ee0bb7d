# SPDX-License-Identifier: Apache-2.0
"""Keeps host memory for reuse, shares it, and keeps copies of states to go back to."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mpi_ckpt.devices import Pin
from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.devices import Lane

__all__ = ["Arena", "Memory", "MemoryCopy", "SharedMemory", "TileShare", "round_up"]

_NUMBER_BITS = 20


def round_up(nbytes: int, multiple: int) -> int:
    """Round a size up to a multiple."""
    return -(-nbytes // multiple) * multiple


class Arena:
    """Host memory that starts at a page boundary and is kept for reuse.

    Not collective. Not thread-safe. Fresh memory costs more than the copy into it (every
    first touch of a page), so an arena only grows; `close` frees it.

    Args:
        huge_pages: Whether to ask for them. Direct reads into them take a third of the time
            (measured on a virtual disk). The first touch takes a quarter of the time on one
            machine, and five times as long on a virtual machine whose host reclaims free
            memory. For memory that may be needed at any time, or is read into.
        is_lent: Whether other processes of this host may map it, where the kernel can.
    """

    def __init__(self, *, huge_pages: bool = False, is_lent: bool = False) -> None:
        self._huge_pages = huge_pages
        self._is_lent = is_lent
        self._memory: mmap.mmap | None = None
        self._shared: SharedMemory | None = None
        self._pin: Pin | None = None

    @property
    def nbytes(self) -> int:
        """How much memory it holds, in bytes."""
        return 0 if self._memory is None else len(self._memory)

    @property
    def shared(self) -> SharedMemory | None:
        """The memory, as far as other processes may map it; None if they may not."""
        return self._shared

    def take(self, nbytes: int) -> memoryview:
        """Return memory of at least that many bytes; invalidates what was returned before.

        Raises:
            OSError: On the calling rank, if there is not enough memory.
        """
        if self.nbytes < max(nbytes, 1):
            self.close()
            self._memory = self._map(max(nbytes, mmap.PAGESIZE))
        assert self._memory is not None
        return memoryview(self._memory)

    def pin(self, lane: Lane) -> None:
        """Let devices copy to and from the memory by themselves, from now on until `close`.

        If the system refuses that, it is not asked again, and copies take longer.

        Args:
            lane: The lane of a device that the process uses.
        """
        if self._pin is None and self._memory is not None:
            address = np.frombuffer(self._memory, np.uint8).ctypes.data
            self._pin = Pin(lane, address, len(self._memory))
            # It must not outlive the mapping, which ends after this object.
            weakref.finalize(self, self._pin.release).atexit = False

    def close(self) -> None:
        """Free the memory, as soon as nothing uses it. Callable twice."""
        if self._pin is not None:
            self._pin.release()
        self._pin = self._memory = None
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _map(self, nbytes: int) -> mmap.mmap:
        if self._is_lent:
            with suppress(OSError):
                self._shared = SharedMemory.create(nbytes)
                return self._shared.mapped
        # Private: shared memory takes 1.5 times as long to touch first.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # if this kernel supports them
            # If the program forks a worker, each page written from then on would be copied.
            memory.madvise(mmap.MADV_DONTFORK)
            if self._huge_pages:
                memory.madvise(mmap.MADV_HUGEPAGE)
        return memory


class SharedMemory:
    """Host memory that other processes of this host can read. No file has its bytes.

    Not collective. Not thread-safe. It goes when the last process that has it ends or drops
    it, however that process ends.

    Args:
        descriptor: Descriptor of the memory; closed by `close`.
        memory: The memory, mapped.
    """

    def __init__(self, descriptor: int, memory: mmap.mmap) -> None:
        self._descriptor: int | None = descriptor
        self._memory = memory
        with suppress(AttributeError, OSError):  # if this kernel supports it
            memory.madvise(mmap.MADV_DONTFORK)

    @classmethod
    def create(cls, nbytes: int) -> SharedMemory:
        """Make memory that starts at a page boundary; it takes room as it is filled.

        Raises:
            OSError: On the calling rank, if this kernel has no such memory.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError(errno.ENOSYS, "no memory can be shared without a file")
        descriptor = os.memfd_create("mpi_ckpt")
        try:
            os.ftruncate(descriptor, nbytes)
            return cls(descriptor, mmap.mmap(descriptor, nbytes))
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(
        cls, process: int, descriptor: int, nbytes: int, access: int = mmap.ACCESS_READ
    ) -> SharedMemory:
        """Map memory that another process has made.

        Args:
            process: Id of that process.
            descriptor: Its `descriptor`, in that process.
            nbytes: Length of the memory.
            access: ``mmap.ACCESS_WRITE`` to write to it as well; ``mmap.ACCESS_COPY`` for
                memory that MPI takes as its own: it may be written, and nobody sees that.

        Raises:
            OSError: On the calling rank, if it may not, or there is no such memory.
            ValueError: On the calling rank, if the memory is shorter.
        """
        how = os.O_RDWR if access == mmap.ACCESS_WRITE else os.O_RDONLY
        mine = os.open(f"/proc/{process}/fd/{descriptor}", how | os.O_CLOEXEC)
        try:
            return cls(mine, mmap.mmap(mine, nbytes, access=access))
        except BaseException:
            os.close(mine)
            raise

    @property
    def descriptor(self) -> int:
        """Its descriptor in this process, until `close`."""
        assert self._descriptor is not None
        return self._descriptor

    @property
    def inode(self) -> int:
        """A number that no other memory of this kernel has, until `close`."""
        return os.fstat(self.descriptor).st_ino

    @property
    def mapped(self) -> mmap.mmap:
        """The mapping itself."""
        return self._memory

    @property
    def view(self) -> memoryview:
        """The memory; it stays mapped as long as something uses it."""
        return memoryview(self._memory)

    def close(self) -> None:
        """Close the descriptor; nobody can attach any more. Callable twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(frozen=True, slots=True)
class MemoryCopy:
    """A complete copy of all states, but for their tiles.

    Attributes:
        step: The training step it was made at.
        text: Description of its contents as JSON, equal for copies of equal form.
        leaves: The bytes of the whole leaves of each state, by its name.
        number: Later copies with tiles have larger numbers; 0 for one without.
    """

    step: int
    text: bytes
    leaves: Mapping[str, Sequence[memoryview]]
    number: int = 0


@dataclass(frozen=True, slots=True)
class TileShare:
    """The tiles that one rank gave to a copy; that rank and another hold them.

    Attributes:
        rank: The rank, in the communicator of the copy.
        table: Which tiles they are, as JSON.
        data: Their bytes.
    """

    rank: int
    table: bytes
    data: memoryview


class Memory:
    """The last copy of a manager's states on this rank; outlives the manager.

    A `CheckpointManager` fills it at each save, in ``remember()``, and in ``step()`` as
    often as ``every`` says. A later manager that is given it, over any ranks, restores from
    it before it reads files, as long as the manager's root holds a copy. Main thread only.

    Args:
        holders: Which ranks hold a copy: ``"all"``, so that any rank may be lost, or
            ``"root"`` alone, which is enough to undo the steps since the copy.
        every: After how many steps ``step()`` makes a copy; None for saves only.

    Attributes:
        shares: Name of a copy -> the tiles of it that this rank holds, of leaves that are
            cut over the ranks. While a copy is made there are those of two.
        origin: The last point in the history of saves that the copy comes from, if known:
            an `Origin` of a local level.

    Raises:
        OptionsError: On every rank that makes it, if an argument cannot be used.
    """

    def __init__(
        self, holders: Literal["root", "all"] = "all", *, every: int | None = None
    ) -> None:
        if holders not in ("root", "all"):
            raise OptionsError(f"holders is {holders!r}: root or all")
        if every is not None and every < 1:
            raise OptionsError(f"every is {every}: at least 1 step, or None")
        self.holders = holders
        self.every = every
        self.arena = Arena()
        self.copy: MemoryCopy | None = None
        self.shares: dict[str, tuple[TileShare, ...]] = {}
        self.origin: tuple[str, int, int] | None = None

    @property
    def step(self) -> int | None:
        """Step of the copy that this rank holds; None if it holds none.

        Not collective.
        """
        return None if self.copy is None else self.copy.step

    @property
    def age(self) -> int:
        """A number that is larger for later copies; -1 for none. Not collective."""
        if self.copy is None:
            return -1
        return (self.copy.step << _NUMBER_BITS) + self.copy.number % (1 << _NUMBER_BITS)

    def is_due(self, step: int) -> bool:
        """Return whether a copy is due after a step. Not collective."""
        return self.every is not None and step % self.every == 0

    def lend(self) -> None:
        """Let new ranks on this host map the copies made from now on. Not collective.

        What they map outlives this process. The first copy takes longer: see `Arena`.
        """
        if self.arena.nbytes == 0:
            self.arena = Arena(is_lent=True)

    def clear(self) -> None:
        """Forget the copy; keep its memory for the next one. Not collective."""
        self.copy = None
        self.shares = {}

    def describe(self) -> str:
        """Return the settings, which must be the same on every rank. Not collective."""
        return f"Memory({self.holders!r}, every={self.every})"
