# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import threading
from contextlib import ExitStack

import pytest

from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.reading.file_reader import OpenFiles

NAMES = [f"{number}.bin" for number in range(10)]


@pytest.fixture
def files(tmp_path):
    """Ten files of ten bytes, of which three are kept open."""
    for name in NAMES:
        (tmp_path / name).write_bytes(name.rjust(10).encode())
    files = OpenFiles(tmp_path, most=3)
    yield files
    files.close()
    files.close()


def read(files: OpenFiles, name: str) -> bytes:
    with files.use(name) as file:
        assert file.nbytes == 10
        return os.pread(file.descriptor, 20, 0)


def number_open(directory) -> int:
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    targets = (os.readlink(link) for link in links if os.path.lexists(link))
    return sum(target.startswith(f"{directory}/") for target in targets)


def test_few_are_open_at_a_time_and_all_can_be_read(files, tmp_path):
    for name in [*NAMES, *reversed(NAMES)]:
        assert read(files, name) == name.rjust(10).encode()
        assert number_open(tmp_path) <= 3
    files.close()
    assert number_open(tmp_path) == 0


def test_one_that_is_used_again_and_again_is_opened_once(files, tmp_path):
    read(files, "0.bin")
    (tmp_path / "0.bin").unlink()
    for name in NAMES[1:]:
        read(files, name)
        assert read(files, "0.bin") == b"     0.bin"


def test_what_is_in_use_is_not_closed(files, tmp_path):
    with ExitStack() as stack:
        used = [stack.enter_context(files.use(name)) for name in NAMES]
        assert number_open(tmp_path) == len(NAMES)
        for name, file in zip(NAMES, used, strict=True):
            assert os.pread(file.descriptor, 10, 0) == name.rjust(10).encode()
    assert number_open(tmp_path) == 3


def test_threads_may_use_them_together(files):
    found = []

    def work() -> None:
        found.extend(read(files, name) == name.rjust(10).encode() for name in NAMES * 20)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 800


def test_direct_where_it_is_taken_and_else_as_ever(files, monkeypatch):
    class Refusing:
        refused = 0

        def __getattr__(self, name):
            return getattr(os, name)

        def open(self, path, flags, *mode):
            if flags & os.O_DIRECT:
                self.refused += 1
                raise OSError(errno.EINVAL, "no direct reads", str(path))
            return os.open(path, flags, *mode)

    seam = Refusing()
    monkeypatch.setattr(filesystem, "os", seam)
    for _ in range(3):
        with files.use("1.bin", direct=True) as file:
            assert os.pread(file.descriptor, 10, 0) == b"     1.bin"
    assert seam.refused == 1


def test_what_cannot_be_opened_is_told(files, tmp_path):
    with pytest.raises(FileNotFoundError), files.use("missing"):
        pass
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="not a regular file"), files.use("fifo"):
        pass
