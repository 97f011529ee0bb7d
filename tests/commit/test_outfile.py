# SPDX-License-Identifier: Apache-2.0
"""Files written from front to back, direct and buffered."""

import errno
import fcntl
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_ckpt.memory import Arena
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.writing import outfile
from mpi_ckpt.storage.writing.outfile import create_out_file


class _Os:
    """The os module with some functions replaced."""

    def __init__(self, **replaced):
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(os, name)


def write(path, pieces, mode, *, known=True):
    nbytes = sum(map(len, pieces)) if known else None
    with create_out_file(path, nbytes=nbytes, mode=mode, staging=Arena()) as out:
        for piece in pieces:
            out.write(memoryview(piece))
        out.finish()


@pytest.mark.parametrize("mode", ["auto", "direct", "buffered"])
@pytest.mark.parametrize("known", [True, False])
@given(sizes=st.lists(st.integers(0, 9000), max_size=8), seed=st.integers(0, 255))
@settings(max_examples=15, deadline=None)
def test_bytes_arrive_whatever_the_pieces(tmp_path_factory, mode, known, sizes, seed):
    path = tmp_path_factory.mktemp("out") / "file"
    pieces = [bytes([(seed + i) % 256]) * size for i, size in enumerate(sizes)]
    write(path, pieces, mode, known=known)
    assert path.read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 20000), st.booleans(), st.integers(0, 2)), max_size=8
    ),
    seed=st.integers(0, 255),
)
@settings(max_examples=30, deadline=None)
def test_kept_bytes_arrive_wherever_they_lie(tmp_path_factory, mode, pieces, seed):
    """Kept or not, where the file will have them or one byte beside, in any order."""
    path = tmp_path_factory.mktemp("out") / "file"
    memory = aligned(200_000)
    memory[:] = np.random.default_rng(seed).integers(0, 256, 200_000, np.uint8)
    expected, offset = bytearray(), 0
    with create_out_file(path, nbytes=None, mode=mode, staging=Arena()) as out:
        for size, is_kept, beside in pieces:
            piece = memory[offset + beside :][:size].data
            (out.write_kept if is_kept else out.write)(piece)
            expected += piece
            offset += len(piece)
        out.finish()
    assert path.read_bytes() == bytes(expected)


def aligned(nbytes):
    memory = np.zeros(nbytes + 4096, np.uint8)
    return memory[-memory.ctypes.data % 4096 :][:nbytes]


def test_kept_bytes_are_written_from_where_they_lie(tmp_path, monkeypatch):
    sources = []

    def pwrite(descriptor, data, offset):
        sources.append((address_of(data), len(data), offset))
        return os.pwrite(descriptor, data, offset)

    monkeypatch.setattr(filesystem, "os", _Os(pwrite=pwrite))
    nbytes = 2 * outfile._BLOCK_BYTES + 4096 + 5
    memory = aligned(nbytes)
    memory[:] = 7
    with create_out_file(
        tmp_path / "file", nbytes=nbytes, mode="direct", staging=Arena()
    ) as out:
        out.write_kept(memory.data)
        out.finish()
    start = memory.ctypes.data
    whole = [(a, n, at) for a, n, at in sources if a == start + at]
    assert sum(n for _, n, _ in whole) == nbytes - 5  # all but the end of the last sector
    assert (tmp_path / "file").read_bytes() == memory.tobytes()


def test_a_failed_write_of_kept_bytes_is_raised(tmp_path, monkeypatch):
    def fail(descriptor, data, offset):
        if offset >= outfile._BLOCK_BYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.pwrite(descriptor, data, offset)

    monkeypatch.setattr(filesystem, "os", _Os(pwrite=fail))
    memory = aligned(8 * outfile._BLOCK_BYTES)

    def write_kept():
        with create_out_file(
            tmp_path / "file", nbytes=None, mode="direct", staging=Arena()
        ) as out:
            out.write_kept(memory.data)
            out.finish()

    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_kept()


@pytest.mark.parametrize("extra", [-1, 0, 1, 4095, 4096, 4097])
def test_direct_files_of_several_blocks(tmp_path, extra):
    data = os.urandom((outfile._BLOCKS + 1) * outfile._BLOCK_BYTES + extra)
    write(tmp_path / "file", [data[:5], data[5:]], "direct")
    assert (tmp_path / "file").read_bytes() == data


def address_of(memory):
    return np.frombuffer(memory, np.uint8).ctypes.data


def test_blocks_are_reused_from_file_to_file(tmp_path):
    staging, where = Arena(), []
    for name in ("a", "b"):
        with create_out_file(
            tmp_path / name, nbytes=None, mode="direct", staging=staging
        ) as out:
            out.write(memoryview(b"x" * 100))
            out.finish()
        where.append(address_of(staging.take(1)))
    assert where[0] == where[1]


def test_small_files_go_through_the_page_cache(tmp_path, monkeypatch):
    flags = []

    def note(path, flag, mode=0o777):
        flags.append(flag)
        return os.open(path, flag, mode)

    monkeypatch.setattr(filesystem, "os", _Os(open=note))
    write(tmp_path / "small", [b"x" * 100], "auto")
    write(tmp_path / "large", [b"x" * outfile._DIRECT_BYTES_MIN], "auto")
    assert [bool(flag & os.O_DIRECT) for flag in flags] == [False, True]


def test_a_file_system_without_direct_writes_is_written_buffered(tmp_path, monkeypatch):
    def refuse(path, flag, mode=0o777):
        descriptor = os.open(path, flag & ~os.O_DIRECT, mode)
        if flag & os.O_DIRECT:  # as Linux does it: made, then refused
            os.close(descriptor)
            raise OSError(errno.EINVAL, "no direct writes here", str(path))
        return descriptor

    monkeypatch.setattr(filesystem, "os", _Os(open=refuse))
    data = os.urandom(outfile._DIRECT_BYTES_MIN)
    write(tmp_path / "file", [data], "auto")
    assert (tmp_path / "file").read_bytes() == data
    with pytest.raises(OSError, match="no direct writes"):
        write(tmp_path / "other", [data], "direct")


def test_space_is_claimed_before_anything_is_written(tmp_path, monkeypatch):
    def full(descriptor, offset, nbytes):
        raise OSError(errno.ENOSPC, "full")

    def never(*args):
        raise AssertionError("written to a full disk")

    monkeypatch.setattr(filesystem, "os", _Os(posix_fallocate=full, pwrite=never))
    with pytest.raises(OSError, match="full"):
        write(tmp_path / "file", [b"x" * outfile._DIRECT_BYTES_MIN], "direct")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failed_write_in_a_thread_is_raised(tmp_path, monkeypatch, code, call):
    # By its place, as two threads write, and may count at once.
    def fail(descriptor, data, offset):
        if offset == (call - 1) * outfile._BLOCK_BYTES:
            raise OSError(code, os.strerror(code))
        return os.pwrite(descriptor, data, offset)

    def never(descriptor):
        raise AssertionError("fsynced a file whose write had failed")

    monkeypatch.setattr(filesystem, "os", _Os(pwrite=fail, fsync=never))
    data = b"x" * (3 * outfile._BLOCK_BYTES)
    with pytest.raises(OSError, match=os.strerror(code)):
        write(tmp_path / "file", [data], "direct")


def test_direct_writes_that_are_refused_go_through_the_page_cache(tmp_path, monkeypatch):
    def pwrite(descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "larger sectors are asked for")
        return os.pwrite(descriptor, data, offset)

    monkeypatch.setattr(filesystem, "os", _Os(pwrite=pwrite))
    data = os.urandom(2 * outfile._DIRECT_BYTES_MIN + 5)
    write(tmp_path / "file", [data], "auto")
    assert (tmp_path / "file").read_bytes() == data
    with pytest.raises(OSError, match="larger sectors"):
        write(tmp_path / "other", [data], "direct")


def test_a_buffered_file_is_written_out_as_it_grows(tmp_path, monkeypatch):
    """So that the fsync at the end finds little left to do."""
    told = []
    monkeypatch.setattr(outfile, "_WRITE_BACK_BYTES", 100)
    monkeypatch.setattr(
        filesystem,
        "start_writeback",
        lambda _, offset, nbytes: told.append((offset, nbytes)),
    )
    write(tmp_path / "file", [b"x" * 60] * 5, "buffered")
    assert told == [(0, 120), (120, 120)]
