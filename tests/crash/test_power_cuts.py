# SPDX-License-Identifier: Apache-2.0
"""Real power cuts: an ext4 file system is shut down in mid-save, then mounted again.

The kernel throws away what is not on disk and recovers the journal, as after a reset. With
``noauto_da_alloc``, for by default ext4 hides a missing fsync before a rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import struct
import subprocess

import pytest

from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.storage import filesystem
from tests.crash.programs.saver import CHANGES
from tests.crash.recorder import in_place_of_os
from tests.crash.world import COUNTS, SEED, STRESS, Saved, Training, judge, scratch

_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): ext4 and XFS have the same
_FLUSH_JOURNAL = 1  # names survive, bytes that were not written do not
_FLUSH_NOTHING = 2

CUTS = 50  # of all moments, in a default run


class Disk:
    """A small ext4 in a file, mounted while it is used."""

    def __init__(self, folder) -> None:
        self.image, self.where = folder / "image", folder / "mounted"
        self.where.mkdir()
        with self.image.open("wb") as image:
            image.truncate(24 << 20)
        subprocess.run(["mkfs.ext4", "-qF", str(self.image)], check=True)

    def mount(self) -> str:
        """Mount it; return why not, if it is refused."""
        command = ["mount", "-o", "loop,noauto_da_alloc", str(self.image), str(self.where)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else ""

    def umount(self) -> None:
        subprocess.run(["umount", str(self.where)], check=True)

    def cut(self, how: int) -> None:
        """Lose power."""
        descriptor = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", how))
        finally:
            os.close(descriptor)


class Cutter:
    """An ``os`` in which power fails once a number of changes was made."""

    def __init__(self, disk: Disk, number: int, how: int) -> None:
        self.changes = 0
        self._numbers = itertools.count(1)
        self._disk, self._number, self._how = disk, number, how

    def __getattr__(self, name):
        function = getattr(os, name)
        return self._counted(function) if name in CHANGES else function

    def open(self, path, flags, mode=0o777):
        if flags & os.O_CREAT:
            return self._counted(os.open)(path, flags, mode)
        return os.open(path, flags, mode)

    def _counted(self, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            self.changes = next(self._numbers)
            if self.changes == self._number:
                self._disk.cut(self._how)
            return result

        return call


@pytest.fixture
def disk():
    folder = scratch()
    try:
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("mkfs.ext4 is not installed")
        disk = Disk(folder)
        refused = disk.mount()
        if refused:
            pytest.skip(f"mounting is not allowed here: {refused.strip()}")
        disk.umount()
        yield disk
    finally:
        if (folder / "mounted").is_mount():
            subprocess.run(["umount", "--lazy", str(folder / "mounted")], check=True)
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


def job(disk, number, how, saves, first):
    """Restore and save until power fails.

    Saves are noted in the list ``saves``.

    Returns:
        Index in it of the last that was acknowledged, -1 for none; number of changes.
    """
    cutter = Cutter(disk, number, how)
    acked = -1
    with in_place_of_os(cutter):
        training = Training(disk.where / "ckpt", keep=2)
        try:
            training.restore()
            for step in range(first, first + 3):
                training.move(step)
                saves.append(Saved.of(step))
                training.manager.save(step)
                acked = len(saves) - 1
                training.manager.wait()
        except CheckpointError:
            assert cutter.changes >= number > 0
        finally:
            training.manager.close()
    return acked, cutter.changes


def cut_and_judge(disk, number, how, count):
    """Let power fail in a job; say what is wrong with what the next one finds."""
    saves = [Saved.of(1)]
    first = 10 * count + 10
    disk.mount()
    with Training(disk.where / "ckpt", keep=2) as training:
        training.save(1)
    acked, _ = job(disk, number, how, saves, first)
    disk.umount()
    disk.mount()
    try:
        return judge(disk.where / "ckpt", saves, max(acked, 0), next_step=first + 5)
    finally:
        shutil.rmtree(disk.where / "ckpt")
        disk.umount()


def count_changes(disk):
    disk.mount()
    with Training(disk.where / "ckpt", keep=2) as training:
        training.save(1)
    _, changes = job(disk, 0, _FLUSH_NOTHING, [], 2)
    shutil.rmtree(disk.where / "ckpt")
    disk.umount()
    return changes


def test_acknowledged_saves_survive_power_cuts(disk):
    rng = random.Random(SEED)
    moments = list(
        itertools.product(
            range(1, count_changes(disk) + 1), (_FLUSH_NOTHING, _FLUSH_JOURNAL)
        )
    )
    assert len(moments) > 80
    for count, (number, how) in enumerate(moments if STRESS else rng.sample(moments, CUTS)):
        fault = cut_and_judge(disk, number, how, count)
        assert fault is None, f"power cut {how} after change {number}: {fault}"
        COUNTS["real power cuts"] += 1


def test_power_cuts_find_a_missing_fsync(disk, monkeypatch):
    monkeypatch.setattr(filesystem, "sync_file", lambda _: None)
    monkeypatch.setattr(filesystem, "sync_directory", lambda _: None)
    changes = count_changes(disk)
    faults = [
        cut_and_judge(disk, changes, how, 0) for how in (_FLUSH_NOTHING, _FLUSH_JOURNAL)
    ]
    assert all(faults), faults
