# SPDX-License-Identifier: Apache-2.0
"""Where there is no flock, a file that the owner rewrites keeps other jobs out."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from contextlib import closing
from functools import partial

import pytest

from mpi_ckpt.errors import FencedError, LockedError, SaveError
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.owning import lock
from mpi_ckpt.storage.owning.lock import DirectoryLock, Lease
from mpi_ckpt.storage.owning.ownership import Ownership
from tests.making import save, some_states
from tests.waiting import limit, wait_for

TERM = 1.0
PROGRAM = """
import errno, os, sys, time
from pathlib import Path
from mpi_ckpt.storage.owning import lock
from mpi_ckpt.storage.owning import lock

lock.RENEW_SECONDS, lock.TERM_SECONDS, lock._SETTLE_SECONDS = 0.05, 1.0, 0.3

def flock(*_):
    raise OSError(errno.ENOSYS, "no locks")

lock.fcntl.flock = flock
try:
    held = lock.DirectoryLock(Path(sys.argv[1]), sys.argv[2], 0.2, locking="lease")
except lock.LockedError as refusal:
    print("refused", flush=True)
else:
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def no_flock(monkeypatch):
    """Let this process have no flock, and leases that are short."""

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock, "TERM_SECONDS", TERM)
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.3)


@pytest.fixture
def job(start_owner):
    """Start processes that want the directory, and say what became of each."""
    return partial(start_owner, PROGRAM)


def hold(root, name: str) -> DirectoryLock:
    return DirectoryLock(root, name, 0.2, locking="lease")


def test_a_job_that_lives_keeps_the_next_one_out(tmp_path, job):
    assert job("first").stdout.readline() == "owned\n"
    with pytest.raises(LockedError, match="job first, process"):
        hold(tmp_path, "second")


def test_a_job_that_was_killed_is_waited_for_one_term(tmp_path, job):
    first = job("first")
    assert first.stdout.readline() == "owned\n"
    first.kill()
    first.wait(limit(30))
    begun = time.monotonic()
    with closing(hold(tmp_path, "second")) as held:
        assert time.monotonic() - begun >= TERM
        held.check()
        assert sorted(os.listdir(tmp_path)) == [".lease-second", ".lock"]


def test_a_job_that_has_closed_is_not_waited_for(tmp_path, monkeypatch):
    hold(tmp_path, "first").close()
    monkeypatch.setattr(lock, "TERM_SECONDS", 600)
    hold(tmp_path, "second").close()
    assert os.listdir(tmp_path) == [".lock"]


def test_a_job_that_ends_within_patience_makes_way(tmp_path):
    held = hold(tmp_path, "first")
    threading.Timer(0.3, held.close).start()
    DirectoryLock(tmp_path, "second", 30, locking="lease").close()


def test_a_job_that_slept_through_its_term_is_fenced_off(tmp_path, job):
    first = job("first")
    assert first.stdout.readline() == "owned\n"
    os.kill(first.pid, signal.SIGSTOP)
    try:
        with closing(hold(tmp_path, "second")) as held:
            os.kill(first.pid, signal.SIGCONT)
            time.sleep(0.5)  # what it renews now is gone, and its name is not in the lock
            held.check()
            assert not (tmp_path / ".lease-first").exists()
    finally:
        os.kill(first.pid, signal.SIGCONT)


def test_what_a_fenced_job_writes_is_not_published(tmp_path):
    old = CheckpointDirectory(tmp_path, ownership=Ownership(locking="lease"))
    old.own()
    assert save(old, some_states()).generation == 1
    (tmp_path / f".lease-{old.job}").unlink()  # as if its term had passed
    new = CheckpointDirectory(tmp_path, ownership=Ownership(locking="lease"))
    with closing(old), closing(new):
        new.own()
        assert save(new, some_states()).generation == 2
        with pytest.raises(FencedError, match=f"job {new.job}"):
            save(old, some_states())
        assert save(new, some_states()).generation == 3


def test_of_many_that_find_a_dead_job_one_gets_the_directory(tmp_path, job):
    first = job("first")
    assert first.stdout.readline() == "owned\n"
    first.kill()
    first.wait(limit(30))
    words = [process.stdout.readline() for process in [job(f"n{i}") for i in range(4)]]
    assert sorted(words) == ["owned\n", *["refused\n"] * 3]


def test_either_takes_a_lease_only_where_there_is_no_flock(tmp_path, monkeypatch):
    with closing(DirectoryLock(tmp_path, "first", 0.2, locking="either")):
        assert (tmp_path / ".lease-first").exists()
        with pytest.raises(LockedError, match="job first"):
            hold(tmp_path, "second")
    monkeypatch.undo()
    with closing(DirectoryLock(tmp_path, "third", 0.2, locking="either")):
        assert os.listdir(tmp_path) == [".lock"]
        with pytest.raises(LockedError, match="job third"):
            DirectoryLock(tmp_path, "fourth", 0.2, locking="either")


@pytest.mark.parametrize("first", ["flock", "lease"])
@pytest.mark.parametrize("second", ["flock", "lease"])
def test_jobs_with_different_options_keep_each_other_out(
    tmp_path, monkeypatch, first, second
):
    monkeypatch.undo()
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    with (
        closing(DirectoryLock(tmp_path, "first", 0.2, locking=first)),
        pytest.raises(LockedError, match="job first"),
    ):
        DirectoryLock(tmp_path, "second", 0.2, locking=second)


def test_a_lease_keeps_out_a_job_whose_host_alone_knows_of_its_flock(tmp_path, monkeypatch):
    """As on Lustre mounted with localflock: each host grants the lock to its own."""
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)
    with closing(hold(tmp_path, "first")), pytest.raises(LockedError, match="job first"):
        DirectoryLock(tmp_path, "second", 0.2, locking="flock")


def test_without_any_lock_the_last_to_start_is_the_owner(tmp_path):
    with (
        closing(DirectoryLock(tmp_path, "first", locking="none")) as first,
        closing(DirectoryLock(tmp_path, "second", locking="none")) as second,
    ):
        second.check()
        with pytest.raises(FencedError, match="job second"):
            first.check()
    assert os.listdir(tmp_path) == [".lock"]


def test_a_lease_that_cannot_be_renewed_is_told_once_and_goes_on(
    tmp_path, monkeypatch, caplog
):
    tries = []

    def fail(path, data):
        tries.append(data)
        raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr(lock.filesystem, "rewrite_file", fail)
    with closing(Lease(tmp_path, "job")):
        assert wait_for(lambda: len(tries) >= 3)
    assert caplog.text.count("cannot be renewed: ESTALE") == 1


def test_a_forked_child_ends_nothing(tmp_path):
    with closing(hold(tmp_path, "first")) as held:
        child = os.fork()
        if child == 0:
            held.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / ".lease-first").exists()
        held.check()


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_what_stands_in_place_of_a_lease_is_refused(tmp_path, kind):
    (tmp_path / ".lock").write_text("job dead, process 1 on nowhere\n")
    path = tmp_path / ".lease-dead"
    path.mkdir() if kind == "directory" else path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match=r"\.lease-dead"):
        hold(tmp_path, "second")
    assert ".lease-second" not in os.listdir(tmp_path)
