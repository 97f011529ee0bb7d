# SPDX-License-Identifier: Apache-2.0
"""On file systems that lack something, or lie: right result, or one clear refusal."""

from __future__ import annotations

import errno
import fcntl
import os
import time

import pytest

from mpi_ckpt.storage import filesystem


def failing(act, *args, **kwargs):
    """Return the name of the error that a call fails with; None if it succeeds."""
    try:
        act(*args, **kwargs)
    except OSError as error:
        return errno.errorcode[error.errno]
    return None


# The disk does what it is asked to.


@pytest.fixture
def disk(odd_disks):
    disk = odd_disks()
    for name in ("a", "b", "c"):
        (disk.path / name).write_text(name)
    return disk


def test_what_is_written_is_in_the_directory_behind_the_disk(disk):
    assert set(os.listdir(disk.path)) == set(os.listdir(disk.backing)) == {*"abc"}
    os.rename(disk.path / "a", disk.path / "d")
    filesystem.link_file(disk.path / "d", disk.path / "e")
    filesystem.sync_directory(disk.path)
    assert (disk.backing / "d").read_text() == (disk.path / "e").read_text() == "a"
    assert os.path.samefile(disk.backing / "d", disk.backing / "e")
    assert os.lstat(disk.path / "e").st_nlink == 2


@pytest.mark.parametrize("how", ["EPERM", "ENOTSUP", "EMLINK"])
def test_links_may_be_refused(disk, how):
    disk.be(link=how)
    assert failing(os.link, disk.path / "a", disk.path / "d") == how
    assert not (disk.backing / "d").exists()


@pytest.mark.parametrize(
    ("how", "told", "is_link"),
    [("copy", None, False), ("symlink", "EIO", True), ("posing symlink", None, True)],
)
def test_links_may_be_something_else(disk, how, told, is_link):
    disk.be(link=how)
    assert failing(os.link, disk.path / "a", disk.path / "d") == told
    assert (disk.path / "d").is_symlink() == is_link
    assert (disk.path / "d").read_text() == "a"
    assert os.lstat(disk.path / "d").st_ino != os.lstat(disk.path / "a").st_ino


def locking(path):
    """Return an open file, and how an attempt to lock it fails."""
    descriptor = os.open(path, os.O_RDWR)
    return descriptor, failing(fcntl.flock, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("how", ["ENOSYS", "ENOTSUP", "ENOLCK", "ignored"])
def test_locks_may_be_refused_or_mean_nothing(disk, how):
    held, told = locking(disk.path / "a")
    assert told is None
    disk.be(flock=how)
    other, told = locking(disk.path / "a")
    assert told == (None if how == "ignored" else how)
    os.close(held)
    os.close(other)


@pytest.mark.parametrize(("locks", "told"), [("server", "EAGAIN"), ("kernel", None)])
def test_locks_are_those_of_a_server_or_of_each_host(odd_disks, tmp_path, locks, told):
    hosts = [odd_disks(backing=tmp_path / "server", locks=locks) for _ in range(2)]
    (tmp_path / "server" / "lock").touch()
    held = [locking(host.path / "lock") for host in hosts]
    again = locking(hosts[1].path / "lock")
    assert [how for _, how in (*held, again)] == [None, told, "EAGAIN"]
    for descriptor, _ in (*held, again):
        os.close(descriptor)


def test_calls_may_be_unknown(disk):
    direct = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT
    os.close(os.open(disk.path / "d", direct))
    disk.be(direct="EINVAL", fallocate="EOPNOTSUPP")
    assert failing(os.open, disk.path / "e", direct) == "EINVAL"
    assert (disk.backing / "e").exists()
    (disk.path / "a").write_bytes(bytes(10000))
    descriptor = os.open(disk.path / "a", os.O_WRONLY)
    # The C library writes bytes where the call is missing, and reads some before.
    assert failing(os.posix_fallocate, descriptor, 0, 20000) == "EBADF"
    disk.be(fallocate=None)
    assert failing(os.posix_fallocate, descriptor, 0, 20000) is None
    disk.be(sync_file="EIO")
    assert failing(os.fsync, descriptor) == "EIO"
    os.close(descriptor)


@pytest.mark.parametrize(
    "how",
    [
        *({"sync_dir": name} for name in ("EINVAL", "ENOTSUP", "EBADF")),
        *({"open_dir": name} for name in ("EBADF", "EISDIR", "EACCES")),
    ],
    ids=str,
)
def test_directories_may_not_be_synced(disk, how):
    disk.be(**how)
    assert failing(filesystem.sync_directory, disk.path) == next(iter(how.values()))
    assert len(os.listdir(disk.path)) == 3


def test_a_sync_may_be_slow(disk):
    disk.be(sync_seconds=0.2)
    start = time.monotonic()
    filesystem.sync_directory(disk.path)
    assert time.monotonic() - start >= 0.2


LIES = {
    "ENOENT": "ENOENT",
    "ESTALE": "ESTALE",
    "EMFILE": "EMFILE",
    "EIO": "EIO",
    "old": ["a", "b"],
    "short": ["a"],
    "empty": [],
    "names": ["x"],
}


@pytest.mark.parametrize("lie", LIES)
def test_one_listing_lies(disk, lie):
    disk.be(listing={"lie": lie, "at": 2, "name": disk.backing.name, "names": ["x"]})
    seen = []
    for _ in range(3):
        try:
            seen.append(sorted(os.listdir(disk.path)))
        except OSError as error:
            seen.append(errno.errorcode[error.errno])
    assert seen == [["a", "b", "c"], LIES[lie], ["a", "b", "c"]]
    assert disk.fired() == [f"listing {lie} {disk.backing.name}"]
    assert disk.fired() == []


@pytest.mark.parametrize(("lie", "times"), [("ENOENT", 1), ("EMFILE", 1), ("ESTALE", 2)])
def test_one_file_is_not_there_for_a_moment(disk, lie, times):
    disk.be(open={"lie": lie, "times": times, "name": "b"})
    assert failing((disk.path / "a").read_text) is None
    assert failing((disk.path / "b").read_text) == lie
    assert (disk.path / "b").read_text() == "b"
    assert disk.fired() == [f"open {lie} b"] * times
