# SPDX-License-Identifier: Apache-2.0
"""On file systems that lack something, or lie: right result, or one clear refusal."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import time
from contextlib import closing
from pathlib import Path

import pytest

from mpi_ckpt.errors import FencedError, LockedError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.owning import lock
from mpi_ckpt.storage.owning.lock import DirectoryLock
from tests.crash.crashes import quiet_scratch
from tests.crash.world import empty
from tests.draws import COUNTS, SEED, STRESS, TIMES
from tests.launch import run_job
from tests.odd_disk import LIFETIME, NotHereError, odd_disk

PROGRAM = str(Path(__file__).parent / "programs" / "on_odd_disk.py")


def failing(act, *args, **kwargs):
    """Return the name of the error that a call fails with; None if it succeeds."""
    try:
        act(*args, **kwargs)
    except OSError as error:
        return errno.errorcode[error.errno]
    return None


# The disk does what it is asked to.


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    try:
        with odd_disk(tmp_path_factory.mktemp("odd")) as disk:
            yield disk
    except NotHereError as error:
        pytest.skip(str(error))


@pytest.fixture
def disk(mounted):
    """One that is mounted once, as new: with three files, and nothing odd about it."""
    mounted.be(**dict.fromkeys(path.name for path in mounted.switches.iterdir()))
    empty(mounted.backing)
    for name in ("a", "b", "c"):
        (mounted.path / name).write_text(name)
    return mounted


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


# What the library makes of it.

WAYS = [
    {},
    {"asynchronous": True},
    {"writers": "all", "io": {"readers": "all"}},
    {"io": {"mode": "direct"}},
]

# Where nothing may be refused, and where all or nothing is.
COMPLETE = [
    {},
    *({"link": how} for how in ("EPERM", "ENOTSUP", "EMLINK")),
    *({"link": how} for how in ("copy", "symlink", "posing symlink")),
    {"fallocate": "EOPNOTSUPP"},
    {"direct": "EINVAL"},
    {"direct": "EINVAL", "fallocate": "ENOSYS", "link": "EPERM"},
    {"sync_seconds": 0.01},
]
UNLOCKED = ("ENOSYS", "ENOTSUP", "ENOLCK")
UNSYNCED = ("EINVAL", "ENOTSUP", "EBADF")
LACKING = [
    *({"flock": how} for how in (*UNLOCKED, "ignored")),
    *({"sync_dir": how} for how in (*UNSYNCED, "EIO")),
    *({"open_dir": how} for how in ("EBADF", "EISDIR", "EACCES")),
    {"sync_file": "EIO"},
]

# Each with the option that does without.
WITHOUT = [
    ({"flock": "ENOSYS"}, {"lock": "lease"}),
    ({"flock": "ENOTSUP"}, {"lock": "none"}),
    *(({"sync_dir": how}, {"io": {"sync_directories": False}}) for how in UNSYNCED),
]

LISTINGS = [{"lie": lie} for lie in ("ENOENT", "ESTALE", "EMFILE", "EIO", "empty", "short")]
LISTINGS += [{"lie": "old", "back": back} for back in (1, 2, 4)]
OPENINGS = [{"lie": lie, "times": 1 + (lie == "ESTALE")} for lie in ("ENOENT", "ESTALE")]
SOME_LISTINGS = 22
AFTERWARDS = 3  # acts once the disk is a good one again
SOME_OPENINGS = 60

pytestmark = pytest.mark.timeout(300 if not STRESS else 3000)


@pytest.fixture
def backing():
    """A directory in memory: what is odd about a disk does not lie below it."""
    with quiet_scratch() as folder:
        yield folder


def go_through(odd_disks, backing, tmp_path, cases, *, seconds=100):
    """Run one job of two ranks through disks; give what was refused on each, in order."""
    disk = odd_disks(seconds=2000 if STRESS else LIFETIME, backing=backing)
    asked, told = tmp_path / "asked", tmp_path / "told"
    asked.write_text(json.dumps(cases))
    command = [PROGRAM, str(disk.path.parent), str(backing), str(asked), str(told)]
    outcome = run_job(2, command, timeout=2500 if STRESS else seconds)
    assert outcome.code == 0, outcome.text
    for line in told.read_text().splitlines():
        report = json.loads(line)
        assert not report["wrong"], report
        assert report["told"][0] == report["told"][1], report
        errors = [error for _, error in report["told"][0] if error is not None]
        # Each says where: the file, and what the system said or what was seen.
        assert all(str(disk.path) in error for error in errors), report
        COUNTS["stories on odd disks"] += 1
        yield report, errors


def in_every_way(disks):
    """Give disks with a way to save, drawn by the seed; with all ways if all is tried."""
    rng = random.Random(f"{SEED} odd disks")
    for disk in disks:
        for way in WAYS if STRESS else rng.sample(WAYS, 1):
            yield disk, way


@pytest.mark.mpi
def test_what_a_disk_lacks_is_done_otherwise(odd_disks, backing, tmp_path):
    cases = list(in_every_way(COMPLETE))
    for report, errors in go_through(odd_disks, backing, tmp_path, cases):
        switches, options = report["case"]
        if "direct" in switches and options.get("io", {}).get("mode") == "direct":
            # Insisted on: every save is refused, and says by which error.
            assert len(errors) >= 4
            assert all("EINVAL" in error for error in errors), report
        else:
            assert errors == [], report


@pytest.mark.mpi
def test_what_cannot_be_done_otherwise_is_refused_by_name(odd_disks, backing, tmp_path):
    cases = list(in_every_way(LACKING))
    if not STRESS:
        cases = random.Random(f"{SEED} lacking").sample(cases, min(4 * TIMES, len(cases)))
    for report, errors in go_through(odd_disks, backing, tmp_path, cases):
        ((switch, how),) = report["case"][0].items()
        assert all(how in error for error in errors), report
        if how in (UNLOCKED if switch == "flock" else UNSYNCED) and switch != "open_dir":
            # Found out before anything was done, with the option that does without.
            assert all("OptionsError" in error for error in errors), report
            assert len(errors) == len(report["told"][0]) - AFTERWARDS, report
            continue
        # A save or none: no disk takes some saves and refuses others.
        assert len(errors) in (0, 4), report


@pytest.mark.mpi
def test_what_a_disk_lacks_is_done_without_where_that_is_asked_for(
    odd_disks, backing, tmp_path
):
    for report, errors in go_through(odd_disks, backing, tmp_path, WITHOUT):
        assert errors == [], report


def test_a_lease_keeps_out_a_job_of_another_host(odd_disks, tmp_path, monkeypatch):
    """Each host grants flock to its own, or to nobody, and sees what the other renews."""
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock, "TERM_SECONDS", 2.0)
    first, other = [
        odd_disks(backing=tmp_path / "server", locks="kernel", **how).path
        for how in ({}, {"flock": "ENOTSUP"})
    ]
    held = DirectoryLock(first, "first", locking="lease")
    with pytest.raises(LockedError, match="job first"):
        DirectoryLock(other, "second", 0.2, locking="lease")
    held._lease.close()  # as if its host was off: what it has signed stays
    with closing(DirectoryLock(other, "second", 0.2, locking="lease")) as successor:
        with pytest.raises(FencedError, match="job second"):
            held.check()
        successor.check()
    held.close()


@pytest.mark.mpi
def test_a_disk_that_lies_once(odd_disks, backing, tmp_path):
    """At most one act fails, on all ranks alike, and nothing is lost."""
    rng = random.Random(f"{SEED} lies")
    if STRESS:
        cases = [[{"listing": {**how, "at": 0}}, way] for how in LISTINGS for way in WAYS]
        turns = range(1, SOME_OPENINGS, 3)
        cases += [[{"open": {**how, "at": at}}, {}] for how in OPENINGS for at in turns]
    else:
        cases = []
        for _ in range(6 * TIMES):
            kind, how = rng.choice(
                [("listing", call) for call in LISTINGS]
                + [("open", call) for call in OPENINGS]
            )
            at = rng.randint(1, SOME_LISTINGS if kind == "listing" else SOME_OPENINGS // 2)
            cases.append([{kind: {**how, "at": at}}, rng.choice(WAYS)])
    fired = 0
    for report, errors in go_through(odd_disks, backing, tmp_path, cases):
        fired += bool(report["fired"])
        assert len(errors) <= 1, report
    assert fired > len(cases) // 2
