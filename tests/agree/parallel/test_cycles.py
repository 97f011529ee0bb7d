# SPDX-License-Identifier: Apache-2.0
"""Managers made and closed over and over: nothing is left of them."""

import gc
import logging
import weakref

import numpy as np
import pytest

from mpi_ckpt import ArrayState, CheckpointManager, ObjectState, Options, checkpoint
from mpi_ckpt.comm import Communicator
from mpi_ckpt.errors import CheckpointError, RegistrationError
from tests.directories import names_in
from tests.ranks import manager


@pytest.fixture
def counted(comm):
    """The job's communicator; counts duplicates that were made and not freed."""
    from mpi4py import MPI

    class Counted(MPI.Intracomm):
        open = 0
        made = 0

        def Idup(self):
            Counted.open += 1
            Counted.made += 1
            made, request = super().Idup()
            return Counted(made), request

        def Free(self):
            Counted.open -= 1
            super().Free()

    return Counted(comm)


@pytest.mark.usefixtures("no_leaks")
def test_hundreds_of_cycles(comm, shared_path, counted):
    cycles = 200 if comm.size < 3 else 100  # as many ranks share the cores
    arrays = {"x": np.zeros(500)}
    value = ObjectState("value", 0)
    states = [ArrayState("a", arrays), value]
    for number in range(1, cycles + 1):
        arrays["x"][:] = value.value = number
        with manager(shared_path, *states, comm=counted) as checkpoints:
            checkpoints.save(step=number)
            arrays["x"][:] = value.value = -1
            assert checkpoints.restore().generation == number
        assert value.value == number
        assert (arrays["x"] == number).all()
    assert (counted.made, counted.open) == (cycles, 0)
    names = comm.bcast(names_in(shared_path))
    kept = range(cycles - 2, cycles + 1)
    assert names == [".lock", *(f"checkpoint-{number:08d}" for number in kept)]


@pytest.mark.usefixtures("no_leaks")
def test_cycles_that_end_in_errors(comm, shared_path, counted):
    state = ObjectState("value", 0)
    for _ in range(30):
        with pytest.raises(RegistrationError):
            manager(shared_path, state, state, comm=counted)
        with manager(shared_path, state, comm=counted) as checkpoints:
            if comm.rank == comm.size - 1:
                state.value = object()
            with pytest.raises(CheckpointError):
                checkpoints.save()
            state.value = 0
            checkpoints.save()
        other = ObjectState("other")
        with (
            manager(shared_path, other, comm=counted) as checkpoints,
            pytest.raises(CheckpointError),
        ):
            checkpoints.restore()
    assert (counted.made, counted.open) == (90, 0)


@pytest.mark.usefixtures("no_leaks")
def test_cycles_behind_the_training(comm, shared_path, counted):
    arrays = {"x": np.zeros(500)}
    for number in range(1, 31):
        arrays["x"][:] = number
        state = ArrayState("a", arrays)
        with manager(shared_path, state, comm=counted, asynchronous=True) as checkpoints:
            checkpoints.save()
            arrays["x"][:] = -1
    with manager(shared_path, state, comm=counted) as checkpoints:
        checkpoints.restore()
    assert (arrays["x"] == 30).all()
    assert (counted.made, counted.open) == (31, 0)


@pytest.mark.usefixtures("no_leaks")
def test_the_adaptdl_surface_is_closed(comm, shared_path, counted):
    for _ in range(20):
        checkpoint.close()
        checkpoint.configure(shared_path, comm=counted)
        state = checkpoint.State("mine")
        checkpoint.save_all_states()
        checkpoint.save_state(state, shared_path / "other")
        assert checkpoint.load_state(state)
    checkpoint.close()
    assert (counted.made, counted.open) == (40, 0)


def test_a_closed_manager_is_gone(comm, shared_path):
    state = ObjectState("value", 0)
    checkpoints = manager(shared_path, state)
    checkpoints.save()
    checkpoints.close()
    checkpoints.close()
    seen = weakref.ref(checkpoints)
    del checkpoints
    gc.collect()
    assert seen() is None


def test_a_block_that_fails_on_one_rank_waits_for_nobody(comm, shared_path):
    failed = False
    try:
        with manager(shared_path):
            if comm.rank == 0:
                raise ZeroDivisionError
    except ZeroDivisionError:
        failed = True
    assert comm.allgather(failed) == [True] + [False] * (comm.size - 1)
    with manager(shared_path, ObjectState("value")) as checkpoints:
        assert checkpoints.save().generation == 1


def test_nothing_is_logged_where_nothing_is_wrong(comm, shared_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    options = Options(interval=1)
    with CheckpointManager(
        shared_path, [ObjectState("value", 1)], options=options
    ) as checkpoints:
        assert checkpoints.restore() is None
        checkpoints.save()
        checkpoints.restore()
        checkpoints.step()
        checkpoints.generations()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


def test_a_communicator_is_closed_once(comm, counted):
    tested = Communicator(counted, deadline_seconds=35)
    tested.close()
    tested.close()
    assert (counted.made, counted.open) == (1, 0)
