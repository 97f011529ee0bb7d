# SPDX-License-Identifier: Apache-2.0
"""Several programs use one directory: readers never fail, a second writer is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mpi_ckpt.errors import LockedError
from mpi_ckpt.storage.owning import lock
from tests.crash.killing import kill, wait_for_death
from tests.crash.world import Saved, Training, leftovers
from tests.draws import COUNTS, STRESS
from tests.launch import end_tree, finish_job, ranks_of, start_job
from tests.waiting import wait_for

PROGRAM = str(Path(__file__).parent / "programs" / "beside.py")
NUMBER = 1000 if STRESS else 60
SECONDS = 1500 if STRESS else 300

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(3 * SECONDS + 200)]


@pytest.fixture
def start(tmp_path):
    jobs = []

    def begin(ranks, role, number=NUMBER):
        jobs.append(start_job(ranks, [PROGRAM, role, str(tmp_path), str(number)]))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.poll() is None:
            end_tree(job.pid)
            finish_job(job)


def wait_until_saved(job, path):
    assert wait_for(lambda: path.exists() or job.poll() is not None, 120), path
    assert path.exists(), finish_job(job).text


def test_readers_never_fail_beside_a_job_that_saves_and_prunes(start, tmp_path):
    saver = start(2, "save")
    wait_until_saved(saver, tmp_path / "started")
    readers = {"restore": start(2, "restore"), "look": start(1, "look")}
    told = {}
    for role, job in readers.items():
        outcome = finish_job(job, timeout=SECONDS)
        assert outcome.code == 0, outcome.text
        told[role] = json.loads((tmp_path / role).read_text())
    (tmp_path / "stop").touch()
    outcome = finish_job(saver, timeout=SECONDS)
    assert outcome.code == 0, outcome.text
    saves = json.loads((tmp_path / "save").read_text())["saves"]
    assert not told["restore"]["failed"], told
    assert not told["look"]["failed"], told
    assert saves >= NUMBER
    assert told["restore"]["generations"] > 5, "it was not saved while it was read"
    COUNTS["saves beside readers"] += saves
    COUNTS["loads beside a writer"] += sum(outcome["loads"] for outcome in told.values())


def test_a_second_job_is_refused_and_told_whose_the_directory_is(start, tmp_path):
    saver = start(2, "save", 1)
    wait_until_saved(saver, tmp_path / "started")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock.DirectoryLock.__init__, "__defaults__", (0.0,))
        with Training(tmp_path / "ckpt") as training:
            for act in (training.restore, lambda: training.save(1)):
                with pytest.raises(LockedError, match="belongs to another running job"):
                    act()
    (tmp_path / "stop").touch()
    assert finish_job(saver, timeout=SECONDS).code == 0
    with Training(tmp_path / "ckpt") as training:
        assert training.restore() is not None


def test_a_killed_job_never_blocks_its_restart(start, tmp_path):
    """Its lock file stays, and names a process; whose number is somebody else's by now."""
    saver = start(2, "save", 10**6)
    wait_until_saved(saver, tmp_path / "started")
    ranks = ranks_of(saver)
    kill(ranks)
    finish_job(saver)
    wait_for_death(ranks)
    left = tmp_path / "ckpt" / ".lock"
    assert left.read_text().startswith("job ")
    left.write_text(f"job somebody, process {os.getpid()} on {os.uname().nodename}\n")
    with Training(tmp_path / "ckpt") as training:
        step = training.restore().step
        training.save(step + 1)
        assert training.restore() == Saved.of(step + 1)
        assert not leftovers(tmp_path / "ckpt")
        assert "process" in left.read_text()
