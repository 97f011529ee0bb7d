# SPDX-License-Identifier: Apache-2.0
"""A restore in the middle of a training: root says once which steps it undoes."""

import numpy as np
import pytest

from mpi_ckpt import ArrayState, CheckpointManager, KeepBest, Options, elastic
from tests.ranks import manager

TOLD = "steps that step() has counted since the last save or restore are undone"


def job_of(comm, path, **options):
    return manager(path, ArrayState("a", {"x": np.zeros(3)}), comm=comm, **options)


def told(caplog):
    return [text for text in caplog.messages if TOLD in text]


def steps(job, number):
    for _ in range(number):
        job.step()


def test_undone_steps_are_told_once_by_root(comm, shared_path, caplog):
    with job_of(comm, shared_path, interval=4) as job:
        job.restore()
        steps(job, 7)
        assert job.restore().step == 4
        assert job.steps == 4
        steps(job, 2)
        job.restore()
    expected = (
        f"restore() went to step 4 of generation 1: 3 {TOLD}. If that was not meant, call "
        "restore() once, before the training; to go back without this warning, "
        "restore(generation=1)"
    )
    assert told(caplog) == ([expected] if comm.rank == 0 else [])


def test_steps_before_a_late_restore_are_told(comm, shared_path, caplog):
    with job_of(comm, shared_path) as job:
        job.save(600)
    with job_of(comm, shared_path) as job:
        steps(job, 2)
        assert job.restore().step == 600
    assert len(told(caplog)) == (1 if comm.rank == 0 else 0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_is_told_where_no_step_is_undone(comm, shared_path, caplog, asynchronous):
    with job_of(comm, shared_path, interval=2, asynchronous=asynchronous) as job:
        job.restore()
        steps(job, 4)
        job.restore()  # of step 4, just saved
        job.restore(only=["a"])
        job.save(5)
        job.restore()
    with job_of(comm, shared_path) as job:
        job.restore()
    assert told(caplog) == []


@pytest.mark.parametrize("choice", [{"generation": 1}, {"step": 0}, {"best": "loss"}])
def test_a_choice_is_taken_as_meant(comm, shared_path, caplog, choice):
    with job_of(comm, shared_path, retention=KeepBest("loss", mode="min")) as job:
        job.save(metrics={"loss": 0.5})
        steps(job, 3)
        assert job.restore(**choice).step == 0
    assert told(caplog) == []


def test_a_recovery_from_memory_tells_nothing(comm, shared_path, caplog):
    state = ArrayState("a", {"x": np.zeros(3)})
    memory, options = elastic.Memory(every=100), Options(preemption_signals=())
    with CheckpointManager(
        shared_path, [state], comm=comm, memory=memory, options=options
    ) as job:
        job.remember()
        steps(job, 3)
        assert job.restore().from_memory
    assert told(caplog) == []
