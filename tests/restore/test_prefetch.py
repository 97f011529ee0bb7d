# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
from contextlib import closing

import pytest

from mpi_ckpt.errors import CorruptGenerationError, ReadError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.reading import proving
from mpi_ckpt.storage.reading.proving import Prefetcher
from mpi_ckpt.storage.reading.read_plan import Window
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.making import Stream, publish

DATA = os.urandom(50_000)


def window(file: str, start: int, end: int) -> Window:
    return Window(file, start, end, ())


@pytest.fixture
def reader(tmp_path):
    path = publish(tmp_path, [Stream("a", DATA), Stream("b", DATA[::-1])])
    with GenerationReader(path) as reader:
        yield reader


@pytest.mark.parametrize("chunk", [4096, 8192, 4 << 20])
def test_windows_come_in_order_with_their_bytes(reader, monkeypatch, chunk):
    monkeypatch.setattr(proving, "_CHUNK_BYTES", chunk)
    ranges = [(0, 1), (0, 0), (4095, 4097), (1, 20_000), (49_000, 50_000), (4096, 8192)]
    windows = [window(name, *span) for span in ranges for name in ("a.bin", "b.bin")]
    with closing(Prefetcher(reader, windows)) as ahead:
        for span in windows:
            data = DATA if span.file == "a.bin" else DATA[::-1]
            assert bytes(ahead.take()) == data[span.start : span.end]


def test_bytes_are_good_while_the_next_window_is_read(reader):
    windows = [window("a.bin", start, start + 100) for start in range(0, 500, 100)]
    with closing(Prefetcher(reader, windows)) as ahead:
        for span in windows:
            taken = ahead.take()
            for future in ahead._reading:
                future.result()
            assert bytes(taken) == DATA[span.start : span.end]


def test_file_that_ends_early_is_damage(reader):
    windows = [window("a.bin", 0, 40_000), window("a.bin", 40_000, 50_000)]
    os.truncate(reader.path / "a.bin", 45_000)
    with closing(Prefetcher(reader, windows)) as ahead:
        assert bytes(ahead.take()) == DATA[:40_000]
        with pytest.raises(CorruptGenerationError, match="ends at 45000"):
            ahead.take()


def test_trouble_of_its_threads_is_raised(reader, monkeypatch):
    class Failing:
        def __getattr__(self, name):
            return getattr(os, name)

        def preadv(self, *_):
            raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(filesystem, "os", Failing())
    with closing(Prefetcher(reader, [window("a.bin", 0, 100)])) as ahead:
        with pytest.raises(ReadError, match="EIO"):
            ahead.take()
        ahead.close()


def test_nothing_to_read_is_no_trouble(reader):
    Prefetcher(reader, []).close()
