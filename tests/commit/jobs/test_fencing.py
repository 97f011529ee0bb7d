# SPDX-License-Identifier: Apache-2.0
"""A job is stopped, its successor takes over, and the job wakes again."""

from __future__ import annotations

import os
import signal
from contextlib import closing

import pytest

from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.directory.recovery import survey
from tests.crash.killing import thread_states
from tests.jobs import PROGRAMS
from tests.launch import ranks_of
from tests.making import save, some_states


def is_stopped(process: int) -> bool:
    return thread_states(process) == {"T"}


@pytest.mark.parametrize("mode", ["blocking", "asynchronous"])
def test_stopped_job_that_wakes_beside_its_successor_publishes_nothing(
    jobs, tmp_path, mode
):
    job = jobs.start(2, PROGRAMS / "cut_off.py", tmp_path, mode)
    steps = [tmp_path / f"step-{rank}" for rank in range(2)]
    jobs.wait_until(
        job, lambda: all(file.exists() and int(file.read_text() or 0) > 3 for file in steps)
    )
    ranks = ranks_of(job)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    try:
        # A thread that is inside of a rename stops after it.
        jobs.wait_until(job, lambda: all(map(is_stopped, ranks)))
        # The file server has given its lock away: to a new file, the old one being gone.
        (tmp_path / "checkpoints" / ".lock").unlink()
        successor = CheckpointDirectory(tmp_path / "checkpoints")
        with closing(successor):
            successor.own()
            found = survey(successor.root).generations[0]
            mine = save(successor, some_states(), step=10**6).generation
            for rank in ranks:
                os.kill(rank, signal.SIGCONT)
            assert jobs.finish(job).code == 0
            assert mine == found + 1
            assert save(successor, some_states(), step=10**6).generation == found + 2
    finally:
        for rank in ranks_of(job):
            os.kill(rank, signal.SIGCONT)
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("FencedError: ")
    assert successor.job in errors[0]
