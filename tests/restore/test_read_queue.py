# SPDX-License-Identifier: Apache-2.0
"""The queue of reads: order, bytes, room in memory, and errors in the middle of it."""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.errors import CorruptGenerationError, ReadError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.reading import read_queue
from mpi_ckpt.storage.reading.read_plan import Window
from mpi_ckpt.storage.reading.read_queue import ReadQueue, ReadShape, ShapeTrial, Slots
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.making import Stream, publish

DATA = os.urandom(50_000)
MIB = 1 << 20


def window(file: str, start: int, end: int) -> Window:
    return Window(file, start, end)


def nothing(number, data):
    """Prove nothing."""


def queue_of(reader, windows, prove=nothing):
    return closing(ReadQueue(reader, windows, prove, Slots.of(windows, MIB)))


@pytest.fixture
def reader(tmp_path):
    path = publish(tmp_path, [Stream("a", DATA), Stream("b", DATA[::-1])])
    with GenerationReader(path) as reader:
        yield reader


@pytest.fixture
def small_reads(monkeypatch):
    def trial():
        return ShapeTrial([ReadShape(3, 4096), ReadShape(2, 8192)], 16384)

    monkeypatch.setattr(read_queue, "ShapeTrial", trial)


@pytest.fixture
def preadv(monkeypatch):
    """Replaces the system's read by a function of the test."""

    def replace(function):
        class Replaced:
            def __getattr__(self, name):
                return getattr(os, name)

            def preadv(self, descriptor, into, offset):
                return function(descriptor, into, offset)

        monkeypatch.setattr(filesystem, "os", Replaced())

    return replace


RANGES = [(0, 1), (0, 0), (4095, 4097), (1, 20_000), (49_000, 50_000), (4096, 8192)]
WINDOWS = [window(name, *span) for span in RANGES for name in ("a.bin", "b.bin")]


@pytest.mark.parametrize("is_small", [False, True])
def test_windows_come_in_order_with_their_bytes_and_proofs(reader, request, is_small):
    if is_small:
        request.getfixturevalue("small_reads")
    with queue_of(reader, WINDOWS, lambda number, data: (number, bytes(data))) as queue:
        for number, span in enumerate(WINDOWS):
            data = DATA if span.file == "a.bin" else DATA[::-1]
            taken, proof = queue.take()
            queue.release()
            assert bytes(taken) == data[span.start : span.end]
            assert proof == (number, bytes(taken))


def test_bytes_stay_until_the_release_after_the_next_take(reader, small_reads):
    windows = [window("a.bin", start, start + 100) for start in range(0, 3000, 100)]
    with queue_of(reader, windows) as queue:
        earlier = None
        for span in windows:
            taken, _ = queue.take()
            # All later windows with room have been read by now.
            wait_until(lambda: queue._in_flight == 0)
            assert bytes(taken) == DATA[span.start : span.end]
            if earlier is not None:
                assert bytes(earlier[0]) == DATA[earlier[1].start : earlier[1].end]
            queue.release()
            earlier = (taken, span)


def test_reads_of_several_windows_and_files_are_in_flight(reader, preadv, small_reads):
    seen, go = [], threading.Event()

    def held(descriptor, into, offset):
        seen.append(descriptor)
        go.wait(10)
        return os.preadv(descriptor, into, offset)

    preadv(held)
    windows = [
        window("a.bin", 0, 4096),
        window("b.bin", 0, 4096),
        window("a.bin", 9000, 9001),
    ]
    with queue_of(reader, windows) as queue:
        wait_until(lambda: len(seen) == 3)
        assert len(set(seen)) == 2
        go.set()
        for _ in windows:
            queue.take()


def test_a_slow_proof_does_not_stop_the_reads(reader, small_reads):
    go, read = threading.Event(), []
    windows = [window("a.bin", 4096 * n, 4096 * (n + 1)) for n in range(read_queue.SLOTS)]

    def prove(number, data):
        if number == 0:
            go.wait(10)
        read.append(number)

    with queue_of(reader, windows, prove) as queue:
        wait_until(lambda: len(read) == len(windows) - 1)
        assert 0 not in read
        go.set()
        for _ in windows:
            queue.take()


def test_file_that_ends_early_is_damage(reader):
    windows = [window("a.bin", 0, 40_000), window("a.bin", 40_000, 50_000)]
    os.truncate(reader.path / "a.bin", 45_000)
    with queue_of(reader, windows) as queue:
        assert bytes(queue.take()[0]) == DATA[:40_000]
        with pytest.raises(CorruptGenerationError, match="ends at 45000"):
            queue.take()


def test_short_reads_are_continued(reader, preadv):
    def short(descriptor, into, offset):
        # As network file systems do, and only at multiples of what direct reads need.
        return os.preadv(descriptor, [into[0][:4096]], offset)

    preadv(short)
    with queue_of(reader, [window("a.bin", 10, 49_990)]) as queue:
        assert bytes(queue.take()[0]) == DATA[10:49_990]


@pytest.mark.parametrize("failing", [0, 2, 5])
def test_an_error_comes_with_its_window_and_not_before(
    reader, preadv, small_reads, failing
):
    windows = [window("a.bin", 8192 * n, 8192 * n + 8000) for n in range(6)]

    def broken(descriptor, into, offset):
        if offset >= 8192 * failing:
            raise OSError(errno.EIO, "I/O error")
        return os.preadv(descriptor, into, offset)

    preadv(broken)
    with queue_of(reader, windows) as queue:
        for span in windows[:failing]:
            assert bytes(queue.take()[0]) == DATA[span.start : span.end]
            queue.release()
        with pytest.raises(ReadError, match="EIO"):
            queue.take()
        queue.close()


def test_error_of_a_proof_is_raised_by_take(reader):
    def prove(number, data):
        if number == 1:
            raise CorruptGenerationError("not what was saved")

    with queue_of(reader, WINDOWS[:3], prove) as queue:
        queue.take()
        with pytest.raises(CorruptGenerationError, match="not what was saved"):
            queue.take()


def test_a_queue_is_closed_in_the_middle_of_its_reads(reader, small_reads):
    windows = [window("a.bin", 100 * n, 100 * n + 50) for n in range(400)]
    with queue_of(reader, windows) as queue:
        queue.take()
    queue.close()


def test_nothing_to_read_is_no_trouble(reader):
    ReadQueue(reader, [], nothing, Slots.of([], 0)).close()


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@st.composite
def windows_in_files(draw):
    starts = st.integers(0, 40_000)
    return [
        window("a.bin", start, start + draw(st.integers(0, 10_000)))
        for start in draw(st.lists(starts, min_size=1, max_size=20))
    ]


@given(windows_in_files(), st.integers(0, 60_000))
def test_windows_that_are_held_together_lie_apart(windows, memory_bytes):
    slots = Slots.of(windows, memory_bytes)
    assert min(2, len(windows)) <= slots.count <= read_queue.SLOTS
    # Unless two windows need more, no more than was asked for, but for ends of pages.
    if slots.count > 2:
        assert slots.nbytes <= memory_bytes + 2 * 4096 * read_queue.SLOTS
    rooms = [slots.room(number, span) for number, span in enumerate(windows)]
    for number, (span, (start, end)) in enumerate(zip(windows, rooms, strict=True)):
        assert end - start == span.end - span.start
        # Direct reads need the same place within a page in memory as in the file.
        assert start % 4096 == span.start % 4096
        assert 0 <= start <= end <= slots.nbytes
        # A read of whole pages stays within the slot.
        first = start - start % 4096
        for other, _ in rooms[number + 1 : number + slots.count]:
            distance = abs(first - (other - other % 4096))
            assert distance >= slots.slot_bytes


RATES = st.floats(1e6, 1e10)


@given(st.lists(RATES, min_size=3, max_size=3))
def test_the_usual_shape_stays_unless_another_is_clearly_faster(rates):
    shapes = [ReadShape(4, MIB), ReadShape(8, MIB), ReadShape(16, MIB)]
    trial = ShapeTrial(shapes, 4 * MIB)
    now, tried = 0.0, []
    trial.note(MIB, now)
    for shape, rate in zip(shapes, rates, strict=True):
        assert trial.shape == shape
        for _ in range(4):
            now += MIB / rate
            trial.note(MIB, now)
        tried.append(rate)
    fastest = max(tried)
    chosen = tried[shapes.index(trial.shape)]
    if chosen == tried[0]:
        assert fastest <= tried[0] * 1.051
    else:
        assert chosen >= fastest * 0.999
        assert chosen >= tried[0] * 1.049
    # It stays with that.
    shape = trial.shape
    trial.note(100 * MIB, now + 1)
    assert trial.shape == shape


def test_reads_that_end_at_the_same_moment_decide_nothing():
    trial = ShapeTrial([ReadShape(1, MIB), ReadShape(2, MIB)], MIB)
    for _ in range(5):
        trial.note(MIB, 1.0)
    assert trial.shape == ReadShape(1, MIB)
