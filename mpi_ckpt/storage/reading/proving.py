# SPDX-License-Identifier: Apache-2.0
"""Reads the blocks of a generation in the best order, and proves each.

Reads bypass the page cache if possible: a proof must concern the bytes on disk, not those
in the cache. While one window is in use, the next is being read.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, TypeAlias

from mpi_ckpt.errors import CorruptGenerationError
from mpi_ckpt.memory import Arena, round_up
from mpi_ckpt.storage.reading.read_plan import plan_reads

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from concurrent.futures import Future

    from mpi_ckpt.storage.format.manifest import StoredLeaf
    from mpi_ckpt.storage.reading.file_reader import FileReader
    from mpi_ckpt.storage.reading.read_plan import DigestBlock, Window
    from mpi_ckpt.storage.reading.reader import GenerationReader

_WINDOW_BYTES = 32 << 20

Refuse: TypeAlias = "Callable[[DigestBlock, CorruptGenerationError], None]"
"""Told of a block that is not what was saved."""


def proven_windows(
    reader: GenerationReader,
    leaves: Sequence[StoredLeaf],
    windows: Sequence[Window],
    refuse: Refuse | None = None,
) -> Generator[memoryview]:
    """Yield the bytes of windows, in order, each while the next is being read.

    Not collective. Not thread-safe. Close the generator if you leave it before its end.

    Args:
        reader: The open generation.
        leaves: The leaves of the windows.
        windows: All or some of the windows that `plan_reads` made from their extents.
        refuse: Called for each block that differs from the saved one; None raises.

    Returns:
        The bytes of each window, valid until the next one is requested.

    Raises:
        CorruptGenerationError: On the calling rank, for the first block that differs from
            the saved one, or a file that ends too early.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    with closing(Prefetcher(reader, windows)) as prefetcher:
        for window in windows:
            data = prefetcher.take()
            for block in window.blocks:
                try:
                    reader.prove(leaves[block.leaf], block.number, window.cut(data, block))
                except CorruptGenerationError as problem:
                    if refuse is None:
                        raise
                    refuse(block, problem)
            yield data


def proven_blocks(
    reader: GenerationReader,
    leaves: Sequence[StoredLeaf],
    *,
    window_bytes: int = _WINDOW_BYTES,
    refuse: Refuse | None = None,
) -> Generator[tuple[DigestBlock, memoryview]]:
    """Yield the blocks of leaves, in the best order for reading.

    Not collective. Not thread-safe. Arguments and errors are those of `proven_windows`.

    Returns:
        Each block, whose ``leaf`` is an index into ``leaves``, and its bytes, valid until
        the next one is requested.
    """
    windows = plan_reads(
        [leaf.extent for leaf in leaves],
        [file.name for file in reader.manifest.files],
        block_bytes=reader.manifest.block_bytes,
        window_bytes=window_bytes,
    )
    with closing(proven_windows(reader, leaves, windows, refuse)) as proven:
        for window, data in zip(windows, proven, strict=True):
            for block in window.blocks:
                yield block, window.cut(data, block)


def verify(reader: GenerationReader) -> None:
    """Prove every byte of a generation, and that tiles make up its cut leaves.

    Not collective.

    Raises:
        CorruptGenerationError: On the calling rank, for the first wrong byte.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    for _ in proven_blocks(reader, reader.leaves()):
        pass


_ALIGNMENT = 4096
_CHUNK_BYTES = 4 << 20
# Reads in flight: two keep a disk busy (measured; benchmarks/README.md).
_THREADS = 2


class Prefetcher:
    """Returns the bytes of windows, in order, each while the next is being read.

    Not collective. Not thread-safe. Its threads end with `close`. Holds memory for two of
    the longest windows, aligned for direct reads.

    Args:
        reader: The open generation.
        windows: The windows to read.
    """

    def __init__(self, reader: FileReader, windows: Sequence[Window]) -> None:
        self._reader = reader
        self._windows = list(windows)
        longest = max((_length(window) for window in self._windows), default=0)
        memory = Arena().take(2 * longest)
        self._halves = [memory[:longest], memory[longest : 2 * longest]]
        self._pool = ThreadPoolExecutor(_THREADS, "mpi_ckpt-read")
        self._reading: list[Future[int]] = []
        self._next = 0
        self._start_next()

    def close(self) -> None:
        """End the threads. Callable twice."""
        self._pool.shutdown(cancel_futures=True)

    def take(self) -> memoryview:
        """Return the bytes of the next window; they are valid until the next call.

        Not collective.

        Raises:
            ReadError: On the calling rank, if the operating system cannot read them.
            CorruptGenerationError: On the calling rank, if the file ends too early.
        """
        index = self._next
        window = self._windows[index]
        start, _ = _aligned(window)
        count = sum(future.result() for future in self._reading)
        self._reader.expect(window.file, start + count, window.end)
        self._next += 1
        self._start_next()
        return self._halves[index % 2][window.start - start : window.end - start]

    def _start_next(self) -> None:
        self._reading = []
        if self._next == len(self._windows):
            return
        window, half = self._windows[self._next], self._halves[self._next % 2]
        start, end = _aligned(window)
        for offset in range(start, end, _CHUNK_BYTES):
            into = half[offset - start : min(offset + _CHUNK_BYTES, end) - start]
            self._reading.append(
                self._pool.submit(self._reader.read_direct, window.file, into, offset)
            )


def _aligned(window: Window) -> tuple[int, int]:
    start = window.start // _ALIGNMENT * _ALIGNMENT
    return start, round_up(window.end, _ALIGNMENT)


def _length(window: Window) -> int:
    start, end = _aligned(window)
    return end - start
