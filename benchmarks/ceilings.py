# SPDX-License-Identifier: Apache-2.0
"""The raw limits: the same bytes through the same device with nothing around them."""

from __future__ import annotations

import contextlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mpi4py import MPI

__all__ = [
    "DigestedCopy",
    "WarmCopy",
    "bcast",
    "drop_cache",
    "fsync_shared",
    "fsync_tree",
    "ibcast",
    "read_buffered",
    "read_direct",
    "write_buffered",
    "write_direct",
]

_BLOCK = 8 << 20
_CACHED = 256 << 10


class WarmCopy:
    """A copy of arrays into memory whose pages are there: what staging costs at least."""

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        self._pairs = [(array, np.empty_like(array)) for array in arrays]
        self()

    def __call__(self) -> None:
        """Copy them all."""
        for array, target in self._pairs:
            np.copyto(target, array)


class DigestedCopy:
    """A digest of arrays, while those of a share of the bytes are copied, piece by piece.

    Args:
        arrays: The arrays.
        share: How much of them is copied, of 1.
    """

    def __init__(self, arrays: Iterable[np.ndarray], share: float) -> None:
        self._arrays = [array.reshape(-1).view(np.uint8) for array in arrays]
        nbytes = int(share * sum(array.nbytes for array in self._arrays))
        self._target = np.zeros(nbytes, np.uint8)
        self()

    def __call__(self) -> None:
        """Go through them all."""
        filled = 0
        for array in self._arrays:
            hasher = xxhash.xxh3_128()
            for start in range(0, len(array), _CACHED):
                piece = array[start : start + _CACHED]
                place = self._target[filled : filled + len(piece)]
                np.copyto(place, piece[: len(place)])
                filled += len(place)
                hasher.update(piece.data)
            hasher.digest()


def bcast(comm: MPI.Intracomm, arrays: Iterable[np.ndarray]) -> None:
    """Broadcast arrays, one call each. Collective."""
    for array in arrays:
        # MPI: counts are 32 bit, so elements are counted, not bytes.
        comm.Bcast(array)


def ibcast(comm: MPI.Intracomm, arrays: Sequence[np.ndarray]) -> None:
    """Broadcast arrays, all posted before one wait. Collective."""
    from mpi4py import MPI

    MPI.Request.Waitall([comm.Ibcast(array) for array in arrays])


def write_buffered(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """Write arrays through the page cache, then fsync."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for array in arrays:
            view = array.reshape(-1).view(np.uint8).data
            while view:
                view = view[os.write(descriptor, view[: 1 << 30]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_direct(
    path: Path, nbytes: int, *, block_bytes: int = _BLOCK, depth: int = 1
) -> None:
    """Write as many bytes by O_DIRECT from aligned blocks, then fsync.

    Through the page cache where the file system takes nothing else.

    Args:
        path: The file.
        nbytes: Its length.
        block_bytes: Bytes of each write.
        depth: Writes in flight.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    descriptor = _open_direct(path, flags)

    def write(block: memoryview, first: int) -> None:
        for offset in range(first, nbytes, depth * block_bytes):
            os.pwrite(descriptor, block, offset)

    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        _in_flight(write, block_bytes, depth)
        os.ftruncate(descriptor, nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_direct(path: Path, *, block_bytes: int = _BLOCK, depth: int = 1) -> None:
    """Read a file by O_DIRECT into aligned blocks, over and over.

    Args:
        path: The file.
        block_bytes: Bytes of each read.
        depth: Reads in flight.
    """
    descriptor = _open_direct(path, os.O_RDONLY)
    nbytes = os.fstat(descriptor).st_size

    def read(block: memoryview, first: int) -> None:
        for offset in range(first, nbytes, depth * block_bytes):
            got = 0
            while got < min(block_bytes, nbytes - offset):
                got += os.preadv(descriptor, [block[got:]], offset + got)

    try:
        _in_flight(read, block_bytes, depth)
    finally:
        os.close(descriptor)


def _in_flight(
    work: Callable[[memoryview, int], None], block_bytes: int, depth: int
) -> None:
    """Let threads work side by side, each with a block of its own."""
    memory = mmap.mmap(-1, depth * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A disk takes or gives a run of memory in one piece much faster than page by page.
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = memoryview(memory)
    blocks = [whole[n * block_bytes :][:block_bytes] for n in range(depth)]
    if depth == 1:
        work(blocks[0], 0)
        return
    with ThreadPoolExecutor(depth) as threads:
        for done in [
            threads.submit(partial(work, block, number * block_bytes))
            for number, block in enumerate(blocks)
        ]:
            done.result()


def read_buffered(path: Path) -> None:
    """Read a file through the page cache into one block, over and over."""
    block = mmap.mmap(-1, _BLOCK)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(block):
            pass


def drop_cache(root: Path, *, everything: bool = False) -> None:
    """Drop the pages of all files below a directory from the page cache.

    Args:
        root: The directory.
        everything: Drop the whole cache, names and inodes too, where that is allowed.
    """
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    if everything:
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3\n")


def fsync_tree(root: Path) -> None:
    """Make all files below a path durable, and the names that lead to them."""
    paths = [root, *root.rglob("*")] if root.is_dir() else [root]
    # Files first: a name is not to be durable before what it stands for.
    for path in [*(p for p in paths if p.is_file()), *(p for p in paths if p.is_dir())]:
        _fsync(path)
    _fsync(root.parent)


def fsync_shared(comm: MPI.Intracomm, root: Path) -> None:
    """Make all files below a directory durable: each rank some, root their names.

    Collective.
    """
    comm.Barrier()  # all have written
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for path in files[comm.rank :: comm.size]:
        _fsync(path)
    comm.Barrier()
    if comm.rank == 0:
        for path in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            _fsync(path)
        _fsync(root.parent)
    comm.Barrier()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError:
        return os.open(path, flags, 0o666)
