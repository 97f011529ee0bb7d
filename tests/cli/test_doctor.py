# SPDX-License-Identifier: Apache-2.0
"""`doctor`: what it finds on this machine, and on machines that are worse."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys

import pytest

from mpi_ckpt.cli.doctor import machine, place
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from tests.commands import ask, fill, run


def verdicts(checks) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def found(answer, name) -> dict:
    return next(check for check in answer["checks"] if check["name"] == name)


def test_this_machine_is_examined_and_left_as_it_was(tmp_path):
    root = fill(tmp_path / "c")
    before = sorted(os.listdir(root))
    answer = ask("doctor", root)
    assert answer["good"]
    assert sorted(os.listdir(root)) == before
    assert {check["area"] for check in answer["checks"]} == {
        "software", "MPI", "launcher", "directory",
    }  # fmt: skip
    assert found(answer, "thread level")["found"] in ("FUNNELED", "SERIALIZED", "MULTIPLE")
    assert machine.family_of(found(answer, "library")["found"]) in ("Open MPI", "MPICH")
    assert "more like the newest" in found(answer, "free space")["advice"]
    assert {check["verdict"] for check in answer["checks"]} <= {"ok", "note"}


def test_a_directory_that_is_not_made_yet_is_looked_at_above(tmp_path):
    answer = ask("doctor", tmp_path / "a" / "b", "--no-mpi")
    assert "not made yet" in found(answer, "directory")["found"]
    assert list(tmp_path.iterdir()) == []


def test_people_see_a_line_for_each(tmp_path):
    result = run("doctor", tmp_path, "--no-mpi")
    assert result.exit_code == 0
    for word in ("software", "launcher", "O_DIRECT", "fsync", "nothing wrong"):
        assert word in result.stdout


def refuse(code):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize(
    ("name", "code", "check", "verdict"),
    [
        ("link_file", errno.EPERM, "hard links", "note"),
        ("sync_file", errno.EIO, "sync", "wrong"),
        ("rename_new", errno.EXDEV, "rename", "wrong"),
        ("make_directory", errno.EROFS, "writing", "wrong"),
    ],
)
def test_what_the_file_system_refuses_is_said(
    tmp_path, monkeypatch, name, code, check, verdict
):
    monkeypatch.setattr(filesystem, name, refuse(code))
    result = verdicts(place.check_directory(tmp_path))
    assert result[check] == verdict
    assert list(tmp_path.iterdir()) == []
    assert run("doctor", tmp_path, "--no-mpi").exit_code == (verdict == "wrong")


def test_no_direct_writes_are_worth_a_note(tmp_path, monkeypatch):
    create = filesystem.create_file

    def buffered_only(path, *, direct=False):
        return refuse(errno.EINVAL)() if direct else create(path)

    monkeypatch.setattr(filesystem, "create_file", buffered_only)
    assert verdicts(place.check_directory(tmp_path))["O_DIRECT"] == "note"


def test_locks_that_do_not_hold_are_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert verdicts(place.check_directory(tmp_path))["flock"] == "wrong"
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    assert verdicts(place.check_directory(tmp_path))["flock"] == "wrong"


def test_directories_that_cannot_be_fsynced_are_wrong(tmp_path, monkeypatch):
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    checks = place.check_directory(tmp_path)
    assert verdicts(checks)["fsync"] == "wrong"
    assert verdicts(checks)["rename"] == "ok"
    (advice,) = [check.advice for check in checks if check.name == "fsync"]
    assert "IO(sync_directories=False)" in advice


def test_a_directory_in_use_and_open_to_all_is_said(tmp_path):
    job = CheckpointDirectory(tmp_path / "c")
    job.own()
    (tmp_path / "c").chmod(0o777)
    result = verdicts(place.check_directory(tmp_path / "c"))
    job.close()
    assert (result["in use"], result["permissions"]) == ("ok", "note")


MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw,nobarrier
30 22 0:40 / /data rw - nfs4 server:/x rw,vers=4.2,local_lock=all
31 30 0:41 / /data/deep\\040er rw - tmpfs tmpfs rw
nonsense
"""


@pytest.mark.parametrize(
    ("where", "kind", "option"),
    [
        ("/home/me", "ext4", "nobarrier"),
        ("/data/x", "nfs4", "local_lock=all"),
        ("/database", "ext4", "nobarrier"),
        ("/data/deep er", "tmpfs", "rw"),
    ],
)
def test_the_innermost_mount_counts(where, kind, option):
    from pathlib import Path

    assert place.mount_of(Path(where), MOUNTS)[0] == kind
    assert option in place.mount_of(Path(where), MOUNTS)[1].split(",")


@pytest.mark.parametrize(
    ("kind", "options", "verdict"),
    [
        ("ext4", "rw", "ok"),
        ("ext4", "rw,nobarrier", "wrong"),
        ("nfs4", "rw,local_lock=none", "note"),
        ("nfs", "rw,nolock", "wrong"),
        ("tmpfs", "rw", "note"),
        ("overlay", "rw", "note"),
        ("lustre", "rw,flock", "note"),
    ],
)
def test_file_systems_are_judged(tmp_path, monkeypatch, kind, options, verdict):
    monkeypatch.setattr(place, "mount_of", lambda *_: (kind, options))
    assert verdicts(place.check_directory(tmp_path))["file system"] == verdict


def test_launchers_are_told_by_their_variables():
    assert machine.check_launcher({})[0].verdict == "ok"
    inner = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
    (only,) = machine.check_launcher(inner)
    assert only.found.startswith("rank 1 of 4")
    nested = {**inner, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    assert verdicts(machine.check_launcher(nested))["agreement"] == "note"
    assert verdicts(machine.check_launcher({"SLURM_JOB_ID": "7"}))["Slurm"] == "note"


def fake_mpirun(directory, text):
    path = directory / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}


def test_an_mpirun_of_another_mpi_is_wrong(tmp_path):
    environ = fake_mpirun(tmp_path, "unknown launcher 1.0")
    checks = machine.check_mpi(environ)
    ours = machine.family_of(next(c.found for c in checks if c.name == "library"))
    assert verdicts(checks)["mpirun"] == "note"
    other = (
        "HYDRA build details: Version: 4.2" if ours == "Open MPI" else "mpirun (Open MPI) 5"
    )
    checks = machine.check_mpi(fake_mpirun(tmp_path, other))
    assert verdicts(checks)["mpirun"] == "wrong"


def test_the_place_in_a_job_is_kept_from_the_probe():
    # With these MPI would wait for, or ask, a launcher that is not there.
    environ = {**os.environ, "PMI_SIZE": "4", "PMI_RANK": "1", "PMIX_RANK": "1"}
    environ |= {"PMIX_NAMESPACE": "x", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_JOB_ID": "1"}
    assert verdicts(machine.check_mpi(environ))["thread level"] == "ok"


def test_an_mpi_that_hangs_is_ended_with_its_children(monkeypatch):
    monkeypatch.setattr(machine, "_MPI_SECONDS", 3)
    run_it = machine.ask

    def hanging(arguments, environ, seconds):
        if "mpi_ckpt.comm.probe" in arguments:
            program = (
                "import subprocess, sys\n"
                'print(\'{"mpi4py": "4"}\', flush=True)\n'
                "subprocess.run(['sleep', '600'])\n"
            )
            arguments = [sys.executable, "-c", program]
        return run_it(arguments, environ, seconds)

    monkeypatch.setattr(machine, "ask", hanging)
    checks = machine.check_mpi(os.environ)
    assert verdicts(checks)["start"] == "wrong"
    assert "hung for" in next(c.found for c in checks if c.name == "start")
    assert verdicts(checks)["mpi4py"] == "ok"


def test_an_mpi_that_cannot_be_loaded_is_wrong(monkeypatch):
    said = '{"mpi4py": "4.1"}\n{"error": "no MPI library could be loaded"}\n'
    monkeypatch.setattr(machine, "ask", lambda *_: (said, "ended with code 0"))
    assert verdicts(machine.check_mpi({}))["library"] == "wrong"
    monkeypatch.setattr(
        machine,
        "version",
        lambda name: (_ for _ in ()).throw(machine.PackageNotFoundError(name)),
    )
    software = verdicts(machine.check_software())
    assert (software["numpy"], software["torch"]) == ("wrong", "ok")
