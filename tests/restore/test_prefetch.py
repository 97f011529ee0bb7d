# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
from contextlib import closing

import pytest

from mpi_ckpt.errors import CorruptGenerationError, ReadError
from mpi_ckpt.storage import filesystem, prefetch
from mpi_ckpt.storage.prefetch import Prefetcher, Run
from mpi_ckpt.storage.reader import GenerationReader
from tests.making import Stream, publish

DATA = os.urandom(50_000)


@pytest.fixture
def reader(tmp_path):
    path = publish(tmp_path, [Stream("a", DATA), Stream("b", DATA[::-1])])
    with GenerationReader(path) as reader:
        yield reader


@pytest.mark.parametrize("chunk", [4096, 8192, 4 << 20])
def test_runs_come_in_order_with_their_bytes(reader, monkeypatch, chunk):
    monkeypatch.setattr(prefetch, "_CHUNK_BYTES", chunk)
    ranges = [(0, 1), (0, 0), (4095, 4097), (1, 20_000), (49_000, 50_000), (4096, 8192)]
    runs = [Run(name, *span) for span in ranges for name in ("a.bin", "b.bin")]
    with closing(Prefetcher(reader, runs)) as ahead:
        for run in runs:
            data = DATA if run.file == "a.bin" else DATA[::-1]
            assert bytes(ahead.take()) == data[run.start : run.end]


def test_bytes_are_good_while_the_next_run_is_read(reader):
    runs = [Run("a.bin", start, start + 100) for start in range(0, 500, 100)]
    with closing(Prefetcher(reader, runs)) as ahead:
        for run in runs:
            taken = ahead.take()
            for future in ahead._reading:
                future.result()
            assert bytes(taken) == DATA[run.start : run.end]


def test_file_that_ends_early_is_damage(reader):
    runs = [Run("a.bin", 0, 40_000), Run("a.bin", 40_000, 50_000)]
    os.truncate(reader.path / "a.bin", 45_000)
    with closing(Prefetcher(reader, runs)) as ahead:
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
    with closing(Prefetcher(reader, [Run("a.bin", 0, 100)])) as ahead:
        with pytest.raises(ReadError, match="EIO"):
            ahead.take()
        ahead.close()


def test_nothing_to_read_is_no_trouble(reader):
    Prefetcher(reader, []).close()
