# SPDX-License-Identifier: Apache-2.0
"""The batch scripts by themselves: commands of the test's stand in for Slurm's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from tests.launch import REPOSITORY, environment
from tests.waiting import limit, wait_for

if TYPE_CHECKING:
    from pathlib import Path

BATCH = REPOSITORY / "scripts" / "slurm" / "train.sbatch"
BENCHMARKS = REPOSITORY / "benchmarks" / "slurm.sbatch"
TIME = "2031-05-01T12:00:00"
OTHER_ZONE = "Asia/Kolkata"
PATIENCE_SECONDS = limit(60)


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def job(folder: Path, loop: str, squeue: str = "exit 1", **env: str) -> subprocess.Popen:
    """Start the script as job 7 of two nodes, around a loop that does as it is told."""
    stand_in(folder, "mpi-ckpt", loop)
    stand_in(folder, "squeue", squeue)
    tell = f"echo $1 >>{folder}/asked; echo JobState=RUNNING"
    stand_in(folder, "scontrol", tell)
    inherited = environment()
    inherited.pop("SLURM_JOB_END_TIME", None)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1"}
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    return subprocess.Popen(
        ["bash", BATCH, "python", "train.py"],
        env={**inherited, **slurm, "PATH": path, **env},
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )


def is_put_back(folder: Path) -> bool:
    path = folder / "asked"
    return path.exists() and "requeue" in path.read_text().splitlines()


@pytest.mark.parametrize(
    ("squeue", "env", "deadline"),
    [
        (f"echo {TIME}", {"TZ": "UTC"}, f"{TIME}+00:00"),
        (f"echo {TIME}", {"TZ": OTHER_ZONE}, f"{TIME}+05:30"),
        # A format that the user likes to read is not for us.
        (f'[ "$SLURM_TIME_FORMAT" = standard ] && echo {TIME}', {"TZ": "UTC"}, f"{TIME}Z"),
        ("echo NONE", {}, ""),
        ("echo N/A", {}, ""),
        ("true", {}, ""),
        ("echo slurm_load_jobs error >&2; exit 1", {}, ""),
        (f"echo {TIME}", {"SLURM_JOB_END_TIME": "1900000000"}, ""),
        (f"echo {TIME}", {"MPI_CKPT_DEADLINE": "1900000001"}, "1900000001"),
    ],
)
def test_job_is_told_its_end_where_slurm_does_not(tmp_path, squeue, env, deadline):
    loop = f'echo "$MPI_CKPT_DEADLINE" >{tmp_path}/told'
    told_format = {"SLURM_TIME_FORMAT": "relative", **env}
    assert job(tmp_path, loop, squeue, **told_format).wait(PATIENCE_SECONDS) == 0
    if "T" in deadline:
        moment = datetime.fromisoformat(deadline.replace("Z", "+00:00"))
        deadline = f"{moment.timestamp():.0f}"
    assert (tmp_path / "told").read_text().strip() == deadline
    assert not is_put_back(tmp_path)


@pytest.mark.parametrize(
    ("asked", "ends", "code", "put_back"),
    [
        (False, 0, 0, False),
        (False, 9, 9, False),  # the loop has given up
        (False, 143, 143, True),  # its own deadline
        (True, 143, 143, True),
        (True, 138, 138, True),  # asked before it could listen
        (True, 0, 0, False),  # it had just finished
    ],
)
def test_job_comes_back_if_it_was_stopped(tmp_path, asked, ends, code, put_back):
    wait = "touch up; for _ in {1..6000}; do sleep 0.01; done" if asked else ""
    started = job(tmp_path, f"trap 'exit {ends}' USR1\n{wait}\nexit {ends}")
    if asked:
        assert wait_for((tmp_path / "up").exists)
        started.send_signal(signal.SIGTERM)
    assert started.wait(PATIENCE_SECONDS) == code
    assert is_put_back(tmp_path) == put_back


@pytest.mark.parametrize(("ends", "rescued"), [(0, False), (9, True), (143, True)])
def test_what_hosts_keep_is_copied_unless_the_job_has_finished(tmp_path, ends, rescued):
    loop = f'[ "$1" = rescue ] && echo "$@" >{tmp_path}/rescued && exit 0\nexit {ends}'
    stand_in(tmp_path, "srun", 'while [ "$1" != mpi-ckpt ]; do shift; done\n"$@"')
    started = job(tmp_path, loop, RESCUE="/local/me /scratch/run")
    assert started.wait(PATIENCE_SECONDS) == ends
    told = tmp_path / "rescued"
    assert told.exists() == rescued
    if rescued:
        assert told.read_text() == "rescue /local/me /scratch/run\n"


@pytest.mark.parametrize("asked", [signal.SIGUSR1, signal.SIGTERM])
def test_job_that_is_asked_before_the_loop_is_there_does_not_begin(tmp_path, asked):
    squeue = "touch asking; for _ in {1..6000}; do [ -e sent ] && break; sleep 0.01; done"
    started = job(tmp_path, "sleep 20; touch trained; exec sleep 60", squeue)
    assert wait_for((tmp_path / "asking").exists)
    started.send_signal(asked)
    (tmp_path / "sent").touch()
    assert started.wait(PATIENCE_SECONDS) == 128 + signal.SIGKILL
    assert not (tmp_path / "trained").exists()
    assert is_put_back(tmp_path)


@pytest.mark.long
def test_the_batch_script_of_the_benchmarks_measures_and_draws(tmp_path):
    """On a cluster srun starts the ranks, of as many as the job has; here mpirun does."""
    stand_in(
        tmp_path,
        "srun",
        f'printf "%s " "$@" >>{tmp_path}/asked\n'
        'while [[ $1 == -* ]]; do shift; done\nexec mpirun -n "$SLURM_NTASKS" "$@"',
    )
    slurm = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    given = {"DIRECTORY": str(tmp_path), "FIGURES": str(tmp_path / "f.jsonl"), "VENV": ""}
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", BENCHMARKS, "step", "--smoke"],
        env={**environment(), **slurm, **given, "REPEATS": "1", "PATH": path},
        cwd=tmp_path, capture_output=True, text=True, timeout=limit(280),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--mpi=pmix --kill-on-bad-exit=1" in (tmp_path / "asked").read_text()
    assert {json.loads(line)["ranks"] for line in figures(tmp_path / "f.jsonl")} == {2}
    assert figures(tmp_path / "f.jsonl.counts")
    assert list((tmp_path / "f").glob("*.html"))


def figures(path: Path) -> list[str]:
    return path.read_text().splitlines()
