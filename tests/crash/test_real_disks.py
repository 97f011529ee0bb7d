# SPDX-License-Identifier: Apache-2.0
"""Real file systems on loop devices: full, over quota, read-only under a running job."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mpi_ckpt.options import IO
from tests.crash.test_real_faults import refusal, used
from tests.crash.world import Saved, Training, judge, leftovers

MIB = 1 << 20


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


@contextlib.contextmanager
def file_system(kind, folder, mib, options=""):
    """Make a file system of its own in a file, and mount it."""
    image, where = folder / "image", folder / "disk"
    where.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"mkfs.{kind} is not installed")
    with image.open("wb") as file:
        file.truncate(mib * MIB)
    quiet = {"ext4": "-qF", "xfs": "-qf", "btrfs": "-qf"}[kind]
    assert run(f"mkfs.{kind}", quiet, str(image)) is not None
    if run("mount", "-o", f"loop{options}", str(image), str(where)) is None:
        pytest.skip(f"mounting {kind} is not allowed here")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)
        image.unlink()


def ballast(training, mib):
    """Give the training a state that takes so much; return what changes it."""
    array = training.arrays.arrays["ballast"] = np.zeros(mib * MIB // 8)
    rng = np.random.default_rng(0)

    def change(step):
        rng.random(out=array)  # nothing to compress, nothing to share
        array[0] = step

    return change


@pytest.mark.parametrize("io", ["auto", "direct", "buffered"])
def test_full_ext4(io, tmp_path):
    with (
        file_system("ext4", tmp_path, 64) as disk,
        Training(disk / "ckpt", keep=9, io=IO(mode=io)) as training,
    ):
        change = ballast(training, 12)
        step, told = 0, None
        while told is None:
            step += 1
            change(step)
            try:
                training.save(step)
            except OSError:
                told = refusal(training.save, step)
        assert step > 2
        assert told.errno == errno.ENOSPC
        assert "bytes and 3 files needed" in str(told)
        assert "nothing of it was written" in str(told)
        assert not leftovers(disk / "ckpt")
        assert training.restore() == Saved.of(step - 1)
        shutil.rmtree(disk / "ckpt" / "checkpoint-00000001")
        change(50)
        training.save(50)
        assert training.restore() == Saved.of(50)


def test_a_stream_that_outgrows_the_disk(tmp_path):
    """How much a plain state writes nobody knows before: it fails where the disk ends."""
    with (
        file_system("ext4", tmp_path, 16) as disk,
        Training(disk / "ckpt") as training,
    ):
        training.save(1)
        before = used(disk)
        training.plain.save = lambda file: [file.write(os.urandom(MIB)) for _ in range(64)]
        error = refusal(training.manager.save, 2)
        assert error.errno == errno.ENOSPC
        assert "plain.bin" in error.path
        assert not leftovers(disk / "ckpt")
        assert used(disk) - before < MIB
        del training.plain.save
        assert training.restore() == Saved.of(1)
        training.save(3)
        assert training.restore() == Saved.of(3)


@pytest.mark.parametrize(("kind", "mib", "share"), [("ext4", 64, 20), ("btrfs", 256, 48)])
def test_what_was_just_pruned_is_room_for_the_next(kind, mib, share, tmp_path):
    """Space comes back late on some file systems, and no save may be refused for that."""
    with (
        file_system(kind, tmp_path, mib) as disk,
        Training(disk / "ckpt", keep=1) as training,
    ):
        change = ballast(training, share)
        for step in range(1, 7):
            change(step)
            training.save(step)
        assert training.restore() == Saved.of(6)


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_quota_of_btrfs(io, tmp_path):
    with file_system("btrfs", tmp_path, 256) as disk:
        root = disk / "mine"
        if run("btrfs", "quota", "enable", str(disk)) is None:
            pytest.skip("quotas of btrfs are not allowed here")
        assert run("btrfs", "subvolume", "create", str(root)) is not None
        assert run("btrfs", "qgroup", "limit", "20M", str(root)) is not None
        with Training(root, keep=9, io=IO(mode=io)) as training:
            change = ballast(training, 6)
            change(1)
            training.save(1)
            ballast(training, 24)(2)
            error = refusal(training.save, 2)
            assert error.errno == errno.EDQUOT
            assert "the quota is used up" in str(error)
            assert not leftovers(root)
            # Where space can be reserved nothing was written, and it says how much it was.
            assert ("reserving 25," in str(error)) == (io == "direct")
            ballast(training, 6)(1)
            assert run("btrfs", "filesystem", "sync", str(disk)) is not None
            training.save(3)
        assert {"checkpoint-00000001", "checkpoint-00000002"} <= set(os.listdir(root))


def test_ext4_that_turns_read_only_under_a_job(tmp_path):
    with file_system("ext4", tmp_path, 32, ",errors=remount-ro") as disk:
        with Training(disk / "ckpt") as training:
            training.save(1)
            device = os.stat(disk).st_dev
            name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
            trigger = Path("/sys/fs/ext4", name.name, "trigger_fs_error")
            try:
                trigger.write_text("made by a test")
            except OSError as error:
                pytest.skip(f"no error can be made here: {error}")
            for step in (2, 3):
                error = refusal(training.save, step)
                assert error.errno == errno.EROFS, error
                assert training.restore() == Saved.of(1)
        image = tmp_path / "image"
        subprocess.run(["umount", str(disk)], check=True)
        subprocess.run(["e2fsck", "-fy", str(image)], check=False, capture_output=True)
        assert run("mount", "-o", "loop", str(image), str(disk)) is not None
        assert judge(disk / "ckpt", [Saved.of(1)], 0) is None
