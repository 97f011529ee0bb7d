# SPDX-License-Identifier: Apache-2.0
"""Reads windows of files ahead of whoever uses them: one in use, the next on its way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from mpi_ckpt.memory import Arena, round_up

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from mpi_ckpt.storage.read_plan import Window
    from mpi_ckpt.storage.reader import GenerationReader

__all__ = ["Prefetcher"]

_ALIGNMENT = 4096
_CHUNK_BYTES = 4 << 20
# Reads in flight: two keep a disk busy (measured; benchmarks/README.md).
_THREADS = 2


class Prefetcher:
    """Gives the bytes of windows, in order, each while the next is being read.

    Not collective. Not thread-safe. Its threads end with `close`. Holds memory for two of
    the longest windows, aligned for direct reads.

    Args:
        reader: The open generation.
        windows: What will be asked for.
    """

    def __init__(self, reader: GenerationReader, windows: Sequence[Window]) -> None:
        self._reader = reader
        self._windows = list(windows)
        longest = max((_length(one) for one in self._windows), default=0)
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
        """Return the bytes of the next window; they are good until the next call.

        Not collective.

        Raises:
            ReadError: On the calling rank, if the operating system cannot read them.
            CorruptGenerationError: On the calling rank, if the file ends before.
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
