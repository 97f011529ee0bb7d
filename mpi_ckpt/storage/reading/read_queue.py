# SPDX-License-Identifier: Apache-2.0
"""Reads windows of files in order, with several reads in flight at any time.

The reads of a window begin before those of the previous window have ended, in another file
too: between windows a disk would be idle otherwise. A window that is read is proven by the
same threads, while they read others.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from mpi_ckpt.memory import Arena, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi_ckpt.storage.reading.file_reader import FileReader
    from mpi_ckpt.storage.reading.read_plan import Window

SLOTS = 4
"""Windows in memory: one in use, one awaited, two that are being read."""

_ALIGNMENT = 4096

Proof = TypeVar("Proof")


@dataclass(frozen=True, slots=True)
class ReadShape:
    """How many reads are in flight, and the length of each in bytes."""

    in_flight: int
    chunk_bytes: int


# The first loses least where other ranks use the cores (measured; benchmarks/README.md).
_SHAPES = (ReadShape(16, 1 << 20), ReadShape(4, 4 << 20), ReadShape(8, 4 << 20))
_TRIAL_BYTES = 64 << 20
# Disks vary by more than this, but not by much more within a tenth of a second.
_GAIN = 1.05


class ShapeTrial:
    """Chooses the shape of reads by the first reads themselves. Not thread-safe.

    Each shape is in use for some bytes. The first one stays unless another is clearly
    faster: where something else limits the reads, all are equally fast.

    Args:
        shapes: The shapes to try, the usual one first.
        trial_bytes: How many bytes to read with each.

    Attributes:
        shape: The shape of the next reads.
    """

    def __init__(
        self, shapes: Sequence[ReadShape] = _SHAPES, trial_bytes: int = _TRIAL_BYTES
    ) -> None:
        self._shapes = shapes
        self._trial_bytes = trial_bytes
        self._rates: list[float] = []
        self._began: float | None = None
        self._nbytes = 0
        self.shape = shapes[0]

    def note(self, nbytes: int, seconds: float) -> None:
        """Note the end of a read.

        Not collective.

        Args:
            nbytes: Bytes that it read.
            seconds: When it ended, by any clock.
        """
        if len(self._rates) == len(self._shapes):
            return
        if self._began is None:  # the first read of all: the queue was empty before
            self._began = seconds
            return
        self._nbytes += nbytes
        if self._nbytes < self._trial_bytes or seconds <= self._began:
            return
        self._rates.append(self._nbytes / (seconds - self._began))
        self._began, self._nbytes = seconds, 0
        tried = len(self._rates)
        self.shape = self._fastest() if tried == len(self._shapes) else self._shapes[tried]

    def _fastest(self) -> ReadShape:
        usual = self._rates[0] * _GAIN
        rated = zip([usual, *self._rates[1:]], self._shapes, strict=True)
        return max(rated, key=lambda pair: pair[0])[1]


@dataclass(frozen=True, slots=True)
class Slots:
    """The memory of a queue: where its windows lie, one after the other, over and over.

    Attributes:
        count: Number of slots.
        slot_bytes: Length of each, a multiple of the alignment of direct reads.
    """

    count: int
    slot_bytes: int

    @classmethod
    def of(cls, windows: Sequence[Window], memory_bytes: int) -> Slots:
        """Return the slots for a queue of windows.

        Not collective. Thread-safe.

        Args:
            windows: The windows.
            memory_bytes: Room for the windows; two slots are made in any case, one for the
                window in use.
        """
        longest = max((_length(window) for window in windows), default=0)
        # Each end of a window may add most of a page.
        fitting = (memory_bytes + 2 * SLOTS * _ALIGNMENT) // max(1, longest)
        return cls(min(len(windows), max(2, min(SLOTS, fitting))), longest)

    @property
    def nbytes(self) -> int:
        """Length of all slots."""
        return self.count * self.slot_bytes

    def room(self, number: int, window: Window) -> tuple[int, int]:
        """Return the start and the end of a window's bytes in the memory.

        Not collective. Thread-safe.

        Args:
            number: Number of the window in the queue.
            window: The window.
        """
        start = number % self.count * self.slot_bytes + window.start % _ALIGNMENT
        return start, start + window.end - window.start


class _Chunk(NamedTuple):
    """One read: number of the window, start and end in the file."""

    window: int
    start: int
    end: int


@dataclass(slots=True)
class _Reading:
    """A window on its way: its outcome, the reads that have not ended, the bytes read."""

    done: Future[memoryview] = field(default_factory=Future)
    left: int = 0
    count: int = 0


class ReadQueue(Generic[Proof]):
    """Returns the bytes of windows in order, read and proven, while it reads later ones.

    Not collective. Not thread-safe. Its threads, which never use MPI, end with `close`.

    Args:
        reader: The files.
        windows: The windows to read.
        prove: Called in a thread with the number of a window and its bytes; what it returns
            is returned by `take`, and what it raises is raised there.
        slots: Where the windows lie in the memory.
    """

    def __init__(
        self,
        reader: FileReader,
        windows: Sequence[Window],
        prove: Callable[[int, memoryview], Proof],
        slots: Slots,
    ) -> None:
        self._reader = reader
        self._windows = windows
        self._prove = prove
        self._slots = slots
        # A device takes a run of memory in one piece: a third of the time (measured).
        self._memory = Arena(huge_pages=True).take(self._slots.nbytes)
        self._trial = ShapeTrial()
        self._lock = Lock()
        self._chunks: deque[_Chunk] = deque()
        self._readings: dict[int, _Reading] = {}
        self._proofs: dict[int, Proof] = {}
        self._opened = self._taken = self._released = self._in_flight = 0
        self._has_failed = self._is_closed = False
        # One or two more than reads in flight: those that prove a window.
        threads = max(shape.in_flight for shape in _SHAPES) + 2
        self._pool = ThreadPoolExecutor(threads, "mpi_ckpt-read")
        self._start_reads()

    def close(self) -> None:
        """End the threads, after the reads that are in flight. Callable twice."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(cancel_futures=True)

    def take(self) -> tuple[memoryview, Proof]:
        """Return the bytes of the next window, and its proof.

        Not collective. The bytes stay until the `release` that follows the next `take`.

        Raises:
            ReadError: On the calling rank, if the operating system cannot read them.
            CorruptGenerationError: On the calling rank, if the file ends too early.
        """
        number = self._taken
        self._taken += 1
        with self._lock:
            reading = self._readings.setdefault(number, _Reading())
        data = reading.done.result()
        with self._lock:
            del self._readings[number]
            return data, self._proofs.pop(number)

    def release(self) -> None:
        """Let later windows overwrite those taken before the last. Not collective."""
        with self._lock:
            self._released = max(0, self._taken - 1)
        self._start_reads()

    def _start_reads(self) -> None:
        """Start reads until as many are in flight as should be, or no slot is free."""
        with self._lock:
            while (chunk := self._next_chunk()) is not None:
                self._pool.submit(self._read, chunk)

    def _next_chunk(self) -> _Chunk | None:
        """Return the next read, which is now in flight; None if none may start."""
        is_full = self._in_flight >= self._trial.shape.in_flight
        if self._has_failed or self._is_closed or is_full:
            return None
        if not self._chunks and not self._open_window():
            return None
        self._in_flight += 1
        return self._chunks.popleft()

    def _open_window(self) -> bool:
        """Cut the next window into reads; return whether there is one with a free slot."""
        number = self._opened
        if number == min(len(self._windows), self._released + self._slots.count):
            return False
        self._opened += 1
        start, end = aligned(self._windows[number])
        step = self._trial.shape.chunk_bytes
        # An empty window is one empty read.
        for offset in range(start, max(end, start + 1), step):
            self._chunks.append(_Chunk(number, offset, min(offset + step, end)))
        self._readings.setdefault(number, _Reading()).left = len(self._chunks)
        return True

    def _read(self, chunk: _Chunk | None) -> None:
        """Read until no more reads should be in flight, in a thread."""
        # Handing each read to another thread would cost more than the read itself.
        while chunk is not None:
            failure: BaseException | None = None
            count = 0
            try:
                count = self._read_chunk(chunk)
            except BaseException as error:  # raised by `take`
                failure = error
            with self._lock:
                self._in_flight -= 1
                self._trial.note(count, time.perf_counter())
                self._note(chunk.window, count, failure)
                chunk = self._next_chunk()

    def _read_chunk(self, chunk: _Chunk) -> int:
        window = self._windows[chunk.window]
        start, _ = aligned(window)
        slot = chunk.window % self._slots.count * self._slots.slot_bytes
        into = self._memory[slot + chunk.start - start : slot + chunk.end - start]
        return self._reader.read_direct(window.file, into, chunk.start)

    def _note(self, number: int, count: int, failure: BaseException | None) -> None:
        """Note the end of a read, and let another thread prove a window that is read."""
        reading = self._readings[number]
        reading.left -= 1
        reading.count += count
        if failure is not None:
            self._has_failed = True
            if not reading.done.done():
                reading.done.set_exception(failure)
        elif reading.left == 0 and not reading.done.done() and not self._is_closed:
            self._pool.submit(self._finish, number, reading)

    def _finish(self, number: int, reading: _Reading) -> None:
        """Prove a window whose reads have ended."""
        window = self._windows[number]
        first, last = self._slots.room(number, window)
        data = self._memory[first:last]
        try:
            start, _ = aligned(window)
            self._reader.expect(window.file, start + reading.count, window.end)
            proof = self._prove(number, data)
        except BaseException as error:  # raised by `take`
            reading.done.set_exception(error)
            return
        with self._lock:
            self._proofs[number] = proof
        reading.done.set_result(data)


def aligned(window: Window) -> tuple[int, int]:
    """Return the smallest run of whole pages of the file that has a window's bytes.

    Not collective. Thread-safe.
    """
    start = window.start // _ALIGNMENT * _ALIGNMENT
    return start, round_up(window.end, _ALIGNMENT)


def _length(window: Window) -> int:
    start, end = aligned(window)
    return end - start
