# SPDX-License-Identifier: Apache-2.0
"""Going back to a generation by number, step or metric; and what comes after."""

import logging
import shutil

import numpy as np
import pytest

import mpi_ckpt
from mpi_ckpt import ArrayState, CheckpointManager, KeepBest, KeepLast, ObjectState
from mpi_ckpt.elastic import Memory
from mpi_ckpt.errors import (
    CollectiveError,
    CorruptGenerationError,
    NoCheckpointError,
    OptionsError,
)
from mpi_ckpt.options import IO
from tests.ranks import assert_same, manager, same_error

SHARD = "rank-00000.safetensors"
LOSSES = {1: 0.5, 2: 0.1, 3: 0.3, 4: float("nan"), 5: 0.4}


class Training:
    """Two states that hold one number."""

    def __init__(self):
        self.arrays = ArrayState("arrays", {"a": np.zeros(3000), "b": np.zeros(10)})
        self.other = ObjectState("other", 0)
        self.states = [self.arrays, self.other]

    def set(self, number):
        for array in self.arrays.arrays.values():
            array[:] = number
        self.other.value = number

    @property
    def holds(self):
        (number,) = {int(n) for a in self.arrays.arrays.values() for n in a}
        return number, self.other.value


@pytest.fixture
def job():
    return Training()


@pytest.fixture
def saved(comm, shared_path, job):
    """A directory with generations 1 to 5, of steps 10 to 40, the last two of one step."""
    with manager(shared_path, *job.states, retention=KeepLast(9)) as checkpoints:
        for number, loss in LOSSES.items():
            job.set(number)
            checkpoints.save(step=10 * min(number, 4), metrics={"loss": loss})
    job.set(-1)
    return shared_path


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ({"generation": 3}, 3),
        ({"generation": np.int64(5)}, 5),
        ({"step": 10}, 1),
        ({"step": 40}, 5),
        ({"best": "loss", "mode": "min"}, 2),
        ({"best": "loss", "mode": "max"}, 1),
        ({}, 5),
    ],
)
def test_a_generation_is_chosen_by_number_step_or_metric(comm, saved, job, asked, number):
    with manager(saved, *job.states) as checkpoints:
        report = checkpoints.restore(**asked)
        assert job.holds == (number, number)
        assert checkpoints.steps == report.step == 10 * min(number, 4)
        assert report.generation == number
        assert_same(comm, (report.generation, report.path))
        assert [info.generation for info in checkpoints.generations()] == [1, 2, 3, 4, 5]


def test_several_readers_read_the_one_that_was_asked_for(comm, saved, job):
    with manager(saved, *job.states, io=IO(readers="all")) as checkpoints:
        assert checkpoints.restore(generation=3).generation == 3
        assert job.holds == (3, 3)


@pytest.mark.parametrize(("mode", "number"), [("min", 2), ("max", 1)])
def test_the_direction_is_that_of_the_retention(comm, saved, job, mode, number):
    kept = KeepLast(9) | KeepBest("loss", mode=mode)
    with manager(saved, *job.states, retention=kept) as checkpoints:
        assert checkpoints.restore(best="loss").generation == number
        with same_error(comm, OptionsError) as caught:
            checkpoints.restore(best="loss", mode={"min": "max", "max": "min"}[mode])
        assert f"mode={mode!r}" in str(caught.error)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"generation": 1, "step": 10}, "give only one of these"),
        ({"best": "loss"}, "no KeepBest for that metric"),
        ({"best": "loss", "mode": "up"}, "mode='min' or mode='max'"),
        ({"mode": "min"}, "give best= as well"),
        (
            {"generation": "newest"},
            "generation='newest': a generation and a step must be integers",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_on_all_ranks(comm, saved, job, asked, told):
    with manager(saved, *job.states) as checkpoints:
        with same_error(comm, OptionsError) as caught:
            checkpoints.restore(**asked)
        assert told in str(caught.error)
        assert job.holds == (-1, -1)
        assert checkpoints.restore().generation == 5


@pytest.mark.parametrize(
    ("asked", "lacking"),
    [
        ({"generation": 7}, "has no generation 7"),
        ({"step": 15}, "no generation of step 15"),
        ({"best": "accuracy", "mode": "max"}, "metric 'accuracy' (mode 'max')"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(comm, saved, job, asked, lacking):
    with manager(saved, *job.states) as checkpoints:
        with same_error(comm, NoCheckpointError) as caught:
            checkpoints.restore(**asked)
        assert lacking in str(caught.error)
        assert "there are: 1 (step 10, loss=0.5), 2 (step 20, loss=0.1)" in str(
            caught.error
        )
        assert "Nothing on disk was changed" in str(caught.error)
        assert job.holds == (-1, -1)


def test_nothing_saved_is_an_error_where_something_was_asked_for(comm, shared_path, job):
    with manager(shared_path, *job.states) as checkpoints:
        assert checkpoints.restore() is None
        with same_error(comm, NoCheckpointError) as caught:
            checkpoints.restore(generation=1)
        assert "there are: none" in str(caught.error)


def test_ranks_that_ask_for_different_ones_are_told(comm, saved, job):
    if comm.size == 1:
        return
    with manager(saved, *job.states) as checkpoints:
        with same_error(comm, CollectiveError) as caught:
            checkpoints.restore(generation=1 + (comm.rank > 0))
        assert "looking for generation 1" in str(caught.error)
        assert "looking for generation 2" in str(caught.error)
        assert checkpoints.restore().generation == 5


@pytest.mark.parametrize("only", [None, ["arrays"]])
@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_damaged_one_is_refused_and_left_where_it_is(comm, saved, job, damage, only):
    if comm.rank == 0:
        path = saved / "checkpoint-00000003" / SHARD
        if damage == "gone":
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    comm.barrier()
    with manager(saved, *job.states) as checkpoints:
        with same_error(comm, CorruptGenerationError) as caught:
            checkpoints.restore(only, generation=3)
        assert caught.error.generation == 3
        assert "was requested" in str(caught.error)
        assert "ask for another; there are: 1 (step 10" in str(caught.error)
        assert checkpoints.restore(generation=2).generation == 2
        assert job.holds == (2, 2)
    if comm.rank == 0:
        assert (saved / "checkpoint-00000003").is_dir()


def test_the_next_save_is_the_newest_and_the_others_stay(comm, saved, job, caplog):
    caplog.set_level(logging.INFO, "mpi_ckpt")
    with manager(saved, *job.states, retention=KeepLast(9)) as checkpoints:
        checkpoints.restore(generation=2)
        job.set(99)
        assert checkpoints.save(step=21).generation == 6
    told = [r.getMessage() for r in caplog.records if "as requested" in r.getMessage()]
    if comm.rank == 0:
        (line,) = told
        assert "newer generations stay: 3, 4, 5" in line
        assert "takes generation 5" in line
        assert f"mpi-ckpt rollback {saved} 2" in line
    else:
        assert told == []
    job.set(-1)
    with manager(saved, *job.states, retention=KeepLast(9)) as checkpoints:
        assert checkpoints.restore().generation == 6
        assert job.holds == (99, 99)
        assert [info.generation for info in checkpoints.generations()] == [1, 2, 3, 4, 5, 6]


def test_without_a_save_the_newest_still_wins_at_the_next_start(comm, saved, job):
    with manager(saved, *job.states) as checkpoints:
        assert checkpoints.restore(generation=2).generation == 2
    with manager(saved, *job.states) as checkpoints:
        assert checkpoints.restore().generation == 5


@pytest.mark.parametrize("back", [False, True])
def test_what_is_carried_comes_from_the_one_that_was_restored(comm, saved, job, back):
    with manager(saved, *job.states, retention=KeepLast(9)) as checkpoints:
        checkpoints.restore(generation=2)
        if back:  # or of the newest, once that was restored
            checkpoints.restore()
        job.set(99)
        checkpoints.save(only=["arrays"])
        job.set(-1)
        checkpoints.restore()
        assert job.holds == (99, 5 if back else 2)


def test_partial_restores_stay_with_the_one_that_was_asked_for(comm, saved, job):
    with manager(saved, *job.states, retention=KeepLast(9)) as checkpoints:
        checkpoints.restore(["arrays"], generation=2)
        assert checkpoints.restore(["other"]).generation == 2
        assert job.holds == (2, 2)
        job.set(99)
        checkpoints.save(only=["arrays"])
        checkpoints.restore()
        assert job.holds == (99, 2)


def test_no_copy_in_memory_stands_in_for_what_was_asked_for(comm, saved, job):
    memory = Memory()
    with CheckpointManager(saved, job.states, memory=memory) as checkpoints:
        checkpoints.restore()
        job.set(77)
        checkpoints.remember()
        report = checkpoints.restore(generation=3)
        assert not report.from_memory
        assert job.holds == (3, 3)
        assert checkpoints.restore().generation == 5  # nor does the copy come back after it


def test_one_that_was_set_aside_is_told_with_its_place(comm, saved, job):
    if comm.rank == 0:
        (saved / ".quarantine").mkdir()
        shutil.move(saved / "checkpoint-00000003", saved / ".quarantine")
    comm.barrier()
    with manager(saved, *job.states) as checkpoints:
        with same_error(comm, NoCheckpointError) as caught:
            checkpoints.restore(generation=3)
        assert str(saved / ".quarantine" / "checkpoint-00000003") in str(caught.error)


def test_every_rank_may_load_by_itself_while_another_restores(comm, saved, job):
    with manager(saved, *job.states) as checkpoints:
        with mpi_ckpt.load(saved, 1 + comm.rank) as loaded:  # another on every rank
            assert (loaded["arrays"]["a"] == loaded.generation).all()
            assert loaded["other"].value() == loaded.generation
        assert checkpoints.restore(best="loss", mode="min").generation == 2
