# SPDX-License-Identifier: Apache-2.0
"""Faults made by the operating system itself, not by a stand-in for ``os``."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mpi_ckpt.errors import CheckpointError, SaveError
from tests.crash.world import Saved, Training, judge, leftovers
from tests.launch import environment
from tests.waiting import limit

PROGRAMS = Path(__file__).parent / "programs"
NOBODY = 65534


def mount(*arguments):
    done = subprocess.run(
        ["mount", *arguments], capture_output=True, text=True, check=False
    )
    return done.stderr if done.returncode else ""


@contextlib.contextmanager
def tmpfs(where, options):
    where.mkdir()
    refused = mount("-t", "tmpfs", "-o", options, "tmpfs", str(where))
    if refused:
        pytest.skip(f"mounting is not allowed here: {refused.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def refusal(save, *arguments):
    """Return the error of a save that must fail, with the file and the errno told."""
    with pytest.raises(SaveError) as caught:
        save(*arguments)
    error = caught.value
    assert error.errno is not None
    assert errno.errorcode[error.errno] in str(error)
    assert error.path is not None
    assert error.path in str(error)
    return error


def used(where):
    status = os.statvfs(where)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_full_file_system(tmp_path):
    with tmpfs(tmp_path / "disk", "size=3m") as disk, Training(disk / "ckpt") as training:
        ballast = training.arrays.arrays["ballast"] = np.zeros(1 << 17)  # 1 MiB
        for step in (1, 2):
            ballast[:] = step  # unchanged, it would take no space a second time
            training.save(step)
        before = used(disk)
        for step in (3, 4):  # the space of the first failure was given back
            ballast[:] = step
            error = refusal(training.save, step)
            assert error.errno == errno.ENOSPC
            assert "the file system is full" in str(error)
            assert str(disk / "ckpt") in error.path
            assert used(disk) == before
            assert not leftovers(disk / "ckpt")
        assert training.restore() == Saved.of(2)
        assert (ballast == 2).all()
        assert mount("-o", "remount,size=8m", str(disk)) == ""
        training.save(5)
        assert training.restore() == Saved.of(5)


def test_restore_from_a_full_file_system_without_lock_file(tmp_path):
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        with Training(disk / "ckpt") as training:
            training.save(1)
        (disk / "ckpt" / ".lock").unlink()
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", 0) as ballast:
            while True:
                ballast.write(bytes(4096))
        with Training(disk / "ckpt") as training:
            assert training.restore() == Saved.of(1)
            assert refusal(training.save, 2).errno == errno.ENOSPC
            (disk / "ballast").unlink()
            training.save(3)
            assert training.restore() == Saved.of(3)


def test_no_inodes_left(tmp_path):
    with tmpfs(tmp_path / "disk", "size=8m,nr_inodes=20") as disk:
        with Training(disk / "ckpt", keep=9) as training:
            step = 1
            training.save(step)
            with contextlib.suppress(CheckpointError):
                while step < 20:
                    training.save(step + 1)
                    step += 1
            assert refusal(training.save, step + 1).errno == errno.ENOSPC
            assert training.restore() == Saved.of(step)
            assert not leftovers(disk / "ckpt")
            assert mount("-o", "remount,nr_inodes=100", str(disk)) == ""
            training.save(50)
        assert judge(disk / "ckpt", [Saved.of(50)], 0) is None


def test_read_only_file_system(tmp_path):
    with tmpfs(tmp_path / "disk", "size=8m") as disk:
        with Training(disk / "ckpt") as training:
            training.save(1)
        assert mount("-o", "remount,ro", str(disk)) == ""
        with Training(disk / "ckpt") as training:
            assert training.restore() == Saved.of(1)
            error = refusal(training.save, 2)
            assert error.errno == errno.EROFS
            assert "read-only" in str(error)
            assert mount("-o", "remount,rw", str(disk)) == ""
            training.save(3)
        assert judge(disk / "ckpt", [Saved.of(1), Saved.of(3)], 1) is None


def test_file_system_that_turns_read_only_under_a_job(tmp_path):
    """As ext4 does with errors=remount-ro: here it is mounted over, read-only."""
    with tmpfs(tmp_path / "disk", "size=8m") as disk, Training(disk) as training:
        training.save(1)
        assert mount("--bind", str(disk), str(disk)) == ""
        try:
            assert mount("-o", "remount,bind,ro", str(disk)) == ""
            assert refusal(training.save, 2).errno == errno.EROFS
            assert training.restore() == Saved.of(1)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        training.save(3)
        assert training.restore() == Saved.of(3)


def run_limited(root, what, prefix=()):
    done = subprocess.run(
        [*prefix, sys.executable, str(PROGRAMS / "limited.py"), str(root), what],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=limit(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("what", "code"), [("fsize", "EFBIG"), ("files", "EMFILE")])
def test_limits_of_the_process(what, code, tmp_path):
    with Training(tmp_path / "ckpt") as training:
        training.save(1)
    told = run_limited(tmp_path / "ckpt", what)
    name, message, number = told.pop("error")
    assert told == {"restored": 1, "leftovers": [], "again": 1, "later": None}
    assert name in ("WriteError", "SaveError", "ReadError")
    assert code in message
    assert str(tmp_path / "ckpt") in message
    assert errno.errorcode[number] == code
    assert judge(tmp_path / "ckpt", [Saved.of(1), Saved.of(3)], 1) is None


def test_directory_of_another_user():
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to become another user")
    nobody = f"--reuid={NOBODY} --regid={NOBODY} --clear-groups".split()
    # pytest's own directories are closed to others.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        reads = ["setpriv", *nobody, sys.executable, "-c", "import mpi_ckpt.manager"]
        if subprocess.run(
            reads, env=environment(), capture_output=True, check=False
        ).returncode:
            pytest.skip("another user cannot read this Python environment")
        root = Path(folder, "ckpt")
        with Training(root) as training:
            training.save(1)
        told = run_limited(root, "other", ["setpriv", *nobody])
        name, message, number = told["error"]
        assert (told["restored"], told["again"]) == (1, 1)
        assert name == "SaveError"
        assert number == errno.EACCES
        assert "EACCES" in message
        assert str(root) in message
        assert told["later"] == told["error"]
        assert judge(root, [Saved.of(1)], 0) is None
