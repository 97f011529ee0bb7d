# SPDX-License-Identifier: Apache-2.0
"""Reads runs of files ahead of whoever uses them: one in use, the next on its way."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from mpi_ckpt.storage.reader import GenerationReader

__all__ = ["Prefetcher", "Run"]

_ALIGNMENT = 4096
_CHUNK_BYTES = 4 << 20
# Reads in flight: two keep a disk busy (measured; benchmarks/README.md).
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Run:
    """A run of bytes of a file: name, start and end."""

    file: str
    start: int
    end: int


class Prefetcher:
    """Gives the bytes of runs, in order, each while the next is being read.

    Not collective. Not thread-safe. Its threads end with `close`. Holds two windows of the
    longest run's length, aligned for direct reads.

    Args:
        reader: The open generation.
        runs: What will be asked for.
    """

    def __init__(self, reader: GenerationReader, runs: Sequence[Run]) -> None:
        self._reader = reader
        self._runs = list(runs)
        longest = max(
            (_aligned(run)[1] - _aligned(run)[0] for run in self._runs), default=0
        )
        self._windows = [memoryview(mmap.mmap(-1, max(longest, 1))) for _ in range(2)]
        self._pool = ThreadPoolExecutor(_THREADS, "mpi_ckpt-read")
        self._reading: list[Future[int]] = []
        self._next = 0
        self._start_next()

    def close(self) -> None:
        """End the threads. Callable twice."""
        self._pool.shutdown(cancel_futures=True)

    def take(self) -> memoryview:
        """Return the bytes of the next run; they are good until the next call.

        Not collective.

        Raises:
            ReadError: On the calling rank, if the operating system cannot read them.
            CorruptGenerationError: On the calling rank, if the file ends before.
        """
        index = self._next
        run = self._runs[index]
        start, _ = _aligned(run)
        count = sum(future.result() for future in self._reading)
        self._reader.expect(run.file, start + count, run.end)
        self._next += 1
        self._start_next()
        return self._windows[index % 2][run.start - start : run.end - start]

    def _start_next(self) -> None:
        self._reading = []
        if self._next == len(self._runs):
            return
        run, window = self._runs[self._next], self._windows[self._next % 2]
        start, end = _aligned(run)
        for offset in range(start, end, _CHUNK_BYTES):
            into = window[offset - start : min(offset + _CHUNK_BYTES, end) - start]
            self._reading.append(
                self._pool.submit(self._reader.read_direct, run.file, into, offset)
            )


def _aligned(run: Run) -> tuple[int, int]:
    return run.start // _ALIGNMENT * _ALIGNMENT, -(-run.end // _ALIGNMENT) * _ALIGNMENT
