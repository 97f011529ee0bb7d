# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from contextlib import closing

import pytest

from mpi_ckpt.errors import FencedError, LockedError, OptionsError, SaveError
from mpi_ckpt.storage.owning import lock
from mpi_ckpt.storage.owning.lock import DirectoryLock
from tests.waiting import limit


def test_second_owner_is_refused_and_told_who_the_first_is(tmp_path):
    with closing(DirectoryLock(tmp_path, "first")):
        with pytest.raises(LockedError) as caught:
            DirectoryLock(tmp_path, "second", patience_seconds=0)
        assert str(tmp_path) in str(caught.value)
        assert f"job first, process {os.getpid()} on " in str(caught.value)
        assert caught.value.path == str(tmp_path / ".lock")


def test_directory_is_free_once_let_go(tmp_path):
    for job in ("first", "second"):
        held = DirectoryLock(tmp_path, job, patience_seconds=0)
        assert (tmp_path / ".lock").read_text().startswith(f"job {job},")
        held.close()
        held.close()


def test_patience_outlasts_an_owner_that_is_ending(tmp_path):
    held = DirectoryLock(tmp_path, "first")
    threading.Timer(0.1, held.close).start()
    DirectoryLock(tmp_path, "second", patience_seconds=30).close()


def test_long_signature_is_replaced_whole(tmp_path):
    DirectoryLock(tmp_path, "x" * 200).close()
    DirectoryLock(tmp_path, "y").close()
    told = f"job y, process {os.getpid()} on {socket.gethostname()}\n"
    assert (tmp_path / ".lock").read_text() == told


def test_owner_that_cannot_be_asked_is_unknown(tmp_path, monkeypatch):
    class Unreadable:
        def __getattr__(self, name):
            return getattr(os, name)

        def pread(self, *_):
            raise OSError(errno.EIO, "I/O error")

    with closing(DirectoryLock(tmp_path, "first")):
        monkeypatch.setattr(lock, "os", Unreadable())
        with pytest.raises(LockedError, match="owner unknown"):
            DirectoryLock(tmp_path, "second", patience_seconds=0)


def test_other_directories_are_not_concerned(tmp_path):
    (tmp_path / "other").mkdir()
    with (
        closing(DirectoryLock(tmp_path, "a")),
        closing(DirectoryLock(tmp_path / "other", "b")),
    ):
        pass


def test_lock_file_is_no_link_and_its_directory_must_exist(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="ELOOP"):
        DirectoryLock(tmp_path, "a")
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(SaveError, match="ENOENT"):
        DirectoryLock(tmp_path / "missing", "a")


def test_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.raises(OptionsError, match="must support flock") as caught:
        DirectoryLock(tmp_path, "a")
    assert caught.value.errno == errno.ENOLCK
    assert "lock='lease'" in str(caught.value)
    DirectoryLock(tmp_path, "a", locking="none").close()


def test_lock_that_fails_is_not_taken_for_a_file_system_without(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    for locking in ("flock", "lease"):
        with pytest.raises(SaveError, match="cannot be locked: EIO"):
            DirectoryLock(tmp_path, "a", locking=locking)


def test_full_disk_keeps_nobody_from_owning(tmp_path, monkeypatch):
    class Full:
        def __getattr__(self, name):
            return getattr(os, name)

        def pwrite(self, *_):
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(lock, "os", Full())
    DirectoryLock(tmp_path, "a").close()


OWNER = """
import os, sys, time
from pathlib import Path
from mpi_ckpt.storage.owning.lock import DirectoryLock

held = DirectoryLock(Path(sys.argv[1]), "owner")
if sys.argv[2] == "fork" and os.fork() == 0:
    os.close(1)
    with open(sys.argv[1] + "/child", "w") as told:
        told.write(str(os.getpid()))
    time.sleep(60)
    os._exit(0)
told = sys.argv[1] + "/child"
while sys.argv[2] == "fork" and not (os.path.exists(told) and os.path.getsize(told)):
    time.sleep(0.01)
print("owned", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(start_owner):
    """Start a process that owns the directory."""

    def start(mode: str):
        process = start_owner(OWNER, mode)
        assert process.stdout.readline() == "owned\n"
        return process

    return start


def test_owner_in_another_process_is_named(tmp_path, owner):
    process = owner("alone")
    with pytest.raises(LockedError, match=f"job owner, process {process.pid} on "):
        DirectoryLock(tmp_path, "second", patience_seconds=0)


def test_killed_owner_blocks_nobody(tmp_path, owner):
    process = owner("alone")
    process.kill()
    process.wait(limit(30))
    DirectoryLock(tmp_path, "second", patience_seconds=0).close()


def test_forked_child_that_outlives_the_owner_blocks_nobody(tmp_path, owner):
    process = owner("fork")
    with pytest.raises(LockedError):
        DirectoryLock(tmp_path, "second", patience_seconds=0)
    # The child may still be on its way to closing what it inherited.
    process.kill()
    process.wait(limit(30))
    DirectoryLock(tmp_path, "second", patience_seconds=10).close()
    child = int((tmp_path / "child").read_text())
    os.kill(child, 0)  # it is alive
    os.kill(child, signal.SIGKILL)


def test_lock_file_that_is_not_found_once_is_looked_for_again(tmp_path, monkeypatch):
    class Forgetful:
        left = 2

        def __getattr__(self, name):
            return getattr(os, name)

        def open(self, path, *given):
            self.left -= 1
            if self.left >= 0:
                raise FileNotFoundError(errno.ENOENT, "not there", str(path))
            return os.open(path, *given)

    with closing(DirectoryLock(tmp_path, "a")) as held:
        monkeypatch.setattr(lock, "os", Forgetful())
        held.check()
        (tmp_path / ".lock").unlink()
        with pytest.raises(FencedError, match="no lock file"):
            held.check()


def test_half_a_signature_is_no_signature(tmp_path, monkeypatch):
    """A short write once; the next try names this job, which is not shut out."""

    class Short:
        def __getattr__(self, name):
            return getattr(os, name)

        def pwrite(self, descriptor, data, offset):
            return os.pwrite(descriptor, data[:3], offset)

    with closing(DirectoryLock(tmp_path, "a")) as held:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "os", Short())
            held._signed = False
            with pytest.raises(SaveError, match=r"signing the lock .* failed: EIO"):
                held.sign()
        assert held.sign()
        held.check()


def test_what_an_nfs_client_has_cached_of_the_lock_is_not_believed(tmp_path, monkeypatch):
    """It keeps the pages of a file that it has open for writing, until they are dropped."""

    class Caching:
        def __init__(self, cached):
            self.cached = cached

        def __getattr__(self, name):
            return getattr(os, name)

        def posix_fadvise(self, descriptor, offset, nbytes, advice):
            assert (offset, nbytes, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
            self.cached = None

        def pread(self, *arguments):
            return os.pread(*arguments) if self.cached is None else self.cached

    with closing(DirectoryLock(tmp_path, "first")) as held:
        path = tmp_path / ".lock"
        monkeypatch.setattr(lock, "os", Caching(path.read_bytes()))
        path.write_text("job second, process 1 on another\n")
        with pytest.raises(FencedError, match="job second, process 1 on another"):
            held.check()
