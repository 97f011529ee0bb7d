# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest

from mpi_ckpt import ArrayState
from mpi_ckpt.engine.save.request import foresee_space
from mpi_ckpt.engine.save.staging import StagedStream
from mpi_ckpt.engine.sync.captured import capture_states
from mpi_ckpt.errors import SaveError, WriteError
from mpi_ckpt.options import Options
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.writing import space
from mpi_ckpt.storage.writing.space import FreeSpace, free_space, require_space
from tests.making import Stream, save

PLENTY = {"f_frsize": 1024, "f_blocks": 900, "f_bfree": 500, "f_bavail": 400}
FILES = {"f_files": 90, "f_ffree": 50, "f_favail": 40}


class Disk:
    """An ``os`` whose file systems tell of themselves what a test wants."""

    def __init__(self, status, *, reserves=None, uid=1000):
        self.status = {**PLENTY, **FILES, **status}
        self.reserves = reserves
        self.uid = uid
        self.asked = 0

    def __getattr__(self, name):
        return getattr(os, name)

    def geteuid(self):
        return self.uid

    def statvfs(self, path):
        self.asked += 1
        return SimpleNamespace(**self.status)

    def posix_fallocate(self, descriptor, offset, nbytes):
        if self.reserves is None or nbytes > self.reserves:
            code = errno.EOPNOTSUPP if self.reserves is None else errno.ENOSPC
            raise OSError(code, os.strerror(code))


@pytest.fixture
def disk(monkeypatch):
    def put(status, **options):
        disk = Disk(status, **options)
        for module in (filesystem, space):
            monkeypatch.setattr(module, "os", disk)
        return disk

    return put


def test_users_have_what_is_not_held_back_for_root(disk, tmp_path):
    disk({})
    assert free_space(tmp_path) == FreeSpace(400 * 1024, 40)
    disk({}, uid=0)
    assert free_space(tmp_path) == FreeSpace(500 * 1024, 40)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"f_blocks": 0, "f_bfree": 0, "f_bavail": 0},
        {"f_files": 0, "f_ffree": 0, "f_favail": 0},
    ],
)
def test_file_systems_that_do_not_say_refuse_nothing(nonsense, disk, tmp_path):
    disk(nonsense)
    free = free_space(tmp_path)
    assert float("inf") in (free.nbytes, free.files)
    require_space(tmp_path, tmp_path, nbytes=1024, files=2)


def test_file_systems_that_cannot_say_refuse_nothing(monkeypatch, tmp_path):
    class Broken(Disk):
        def statvfs(self, path):
            raise OSError(errno.ENOSYS, "no")

    monkeypatch.setattr(space, "os", Broken({}))
    require_space(tmp_path, tmp_path, nbytes=1 << 60, files=1 << 40)


def test_what_fits_costs_one_question(disk, tmp_path):
    asked = disk({})
    require_space(tmp_path, tmp_path, nbytes=400 * 1024, files=40)
    assert asked.asked == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("nbytes", "files"), [(400 * 1024 + 1, 2), (1, 41)])
def test_what_does_not_fit_is_told_in_full(nbytes, files, disk, tmp_path):
    disk({})
    with pytest.raises(WriteError) as caught:
        require_space(tmp_path, tmp_path / "it", nbytes=nbytes, files=files)
    error = caught.value
    assert (error.errno, error.path) == (errno.ENOSPC, str(tmp_path / "it"))
    told = f"{nbytes:,} bytes and {files} files needed, 409,600 bytes and 40 files free"
    assert told in str(error)
    assert "keep fewer" in str(error)
    assert os.listdir(tmp_path) == []


def test_space_that_comes_back_late_is_asked_for(disk, tmp_path):
    """As on btrfs, whose statvfs forgets for a while what was just deleted."""
    disk({"f_bavail": 0}, reserves=5000)
    if not direct_writes(tmp_path):
        pytest.skip("this file system takes no direct writes, so nothing can be reserved")
    require_space(tmp_path, tmp_path, nbytes=5000, files=2)
    with pytest.raises(WriteError):
        require_space(tmp_path, tmp_path, nbytes=5001, files=2)
    assert os.listdir(tmp_path) == []


def direct_writes(where):
    try:
        os.close(os.open(where / "try", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        (where / "try").unlink(missing_ok=True)
    return True


@pytest.fixture
def directory(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    directory.own()
    yield directory
    directory.close()


def test_a_save_is_refused_before_its_first_byte(directory, disk, tmp_path):
    state = ArrayState("arrays", {"w": np.zeros(1000)})
    save(directory, [state])
    before = sorted(os.listdir(tmp_path))
    state.arrays["w"][:] = 1
    small = disk({"f_bavail": 7})
    written = []
    small.pwrite = lambda *given: written.append(given)
    with pytest.raises(SaveError, match="nothing of it was written"):
        save(directory, [state])
    assert written == []
    assert sorted(os.listdir(tmp_path)) == before


def test_what_is_shared_needs_no_space(directory, disk):
    state = ArrayState("arrays", {"w": np.zeros(100_000)})
    save(directory, [state])
    disk({"f_bavail": 4})
    assert save(directory, [state], options=Options()).bytes_reused == 800_000


def test_no_more_is_foreseen_than_is_written_and_hardly_less(directory):
    arrays = {f"layer.{n}.weight": np.full(200, n, np.float64) for n in range(300)}
    states = [ArrayState("arrays", arrays)]
    streams = [StagedStream("plain", memoryview(bytes(5000)))]
    contents = capture_states(states)
    needs = foresee_space(contents, [range(300)], streams)
    written = save(directory, [*states, Stream("plain", bytes(5000))])
    files = os.listdir(written.path)
    assert needs.files == len(files)
    assert 0.85 * written.bytes_written < needs.nbytes <= written.bytes_written


def test_nothing_fresh_needs_a_manifest_only():
    contents = capture_states([ArrayState("arrays", {"w": np.zeros(9)})])
    nothing, everything = (foresee_space(contents, [n], [Stream("s")]) for n in ([], [0]))
    assert (nothing.files, everything.files) == (2, 3)
    assert 0 < nothing.nbytes < 200
    assert everything.nbytes - nothing.nbytes > 9 * 8
