# SPDX-License-Identifier: Apache-2.0
"""From the first line of a manager on, all ranks hear the same, or nobody waits."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest

from mpi_ckpt import CheckpointManager, ObjectState, Options
from mpi_ckpt.comm import liveness
from mpi_ckpt.errors import (
    CollectiveError,
    LaunchError,
    OptionsError,
    RegistrationError,
)
from tests.ranks import manager, same_error


def test_a_root_of_the_wrong_type_on_one_rank(comm, shared_path):
    last = comm.size - 1
    root = 7 if comm.rank == last else shared_path / "c"
    with same_error(comm, OptionsError, f"rank {last} of {comm.size}", "finding the dir"):
        CheckpointManager(root)


def test_a_relative_root_where_one_rank_has_no_working_directory(comm, shared_path):
    last, before = comm.size - 1, os.getcwd()
    if comm.rank == last:
        gone = shared_path / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
    try:
        named = f"rank {last} of {comm.size}"
        with same_error(comm, OptionsError, named, "'checkpoints', and the working dir"):
            CheckpointManager("checkpoints")
    finally:
        os.chdir(before)


def test_states_that_cannot_be_made_on_one_rank(comm, shared_path):
    last = comm.size - 1

    def states():
        yield ObjectState("a", 1)
        if comm.rank == last:
            raise ZeroDivisionError("of the program")

    with same_error(comm, RegistrationError, f"rank {last}", "of the program"):
        CheckpointManager(shared_path / "c", states())


def test_options_that_cannot_be_read_on_one_rank(comm, shared_path):
    class Odd:
        deadline_seconds = 60.0
        io = Options().io
        lock = "flock"
        read_only = None
        preemption_signals = ()
        stop = Options().stop
        interval = None
        abort_on_error = False
        hooks = Options().hooks

        def describe(self):
            raise ValueError("no options at all")

    last = comm.size - 1
    options = Odd() if comm.rank == last else Options(deadline_seconds=60)
    with same_error(comm, OptionsError, "no options at all"):
        CheckpointManager(shared_path / "c", options=options)


def test_communicators_that_are_none(comm, shared_path):
    from mpi4py import MPI

    freed = comm.Dup()
    freed.Free()
    for bad in (MPI.COMM_NULL, freed):
        with pytest.raises(LaunchError, match="COMM_NULL"):
            CheckpointManager(shared_path / "c", comm=bad)


def test_a_communicator_of_two_groups(comm, shared_path):
    from mpi4py import MPI

    if comm.size < 2:
        pytest.skip("needs a second rank")
    side = comm.rank % 2
    mine = comm.Split(side)
    both = mine.Create_intercomm(0, MPI.COMM_WORLD, 1 - side)
    with pytest.raises(LaunchError, match="Merge"):
        CheckpointManager(shared_path / "c", comm=both)
    both.Free()
    mine.Free()


@pytest.mark.parametrize("call", ["save", "restore", "sync", "generations", "step"])
def test_a_manager_that_is_closed_says_so(comm, shared_path, call):
    checkpoints = manager(shared_path / "c", ObjectState("a", 1))
    checkpoints.close()
    with pytest.raises(CollectiveError, match="this manager is closed"):
        getattr(checkpoints, call)()
    checkpoints.close()
    # Nothing was taken hold of that would keep the next one out.
    with manager(shared_path / "c", ObjectState("a", 1)) as another:
        another.save()


def test_closing_twice_after_a_confusion_and_a_late_step(peers, shared_path):
    """A vote from before the confusion stays posted; no close may look at it."""
    checkpoints = manager(shared_path / "c", ObjectState("a", 1))
    checkpoints.step()
    with pytest.raises(CollectiveError, match="different things"):
        (checkpoints.restore if peers.rank else checkpoints.save)()
    checkpoints.close()
    with pytest.raises(CollectiveError, match="this manager is closed"):
        checkpoints.step()
    checkpoints.close()


def test_another_thread_is_refused_at_once(comm, shared_path):
    caught = []

    def save(checkpoints):
        try:
            checkpoints.save()
        except CollectiveError as error:
            caught.append(str(error))

    with manager(shared_path / "c", ObjectState("a", 1)) as checkpoints:
        thread = threading.Thread(target=save, args=(checkpoints,))
        thread.start()
        thread.join()
        assert "called in another thread" in caught[0]
        checkpoints.save()


def test_a_forked_process_is_refused_at_once(comm, shared_path):
    with manager(shared_path / "c", ObjectState("a", 1)) as checkpoints:
        checkpoints.save()
        child = os.fork()
        if child == 0:  # it must not come back into the tests
            code = 1
            try:
                checkpoints.save()
            except CollectiveError as error:
                code = 0 if "was forked from rank" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        checkpoints.save()


def test_who_waits_says_so_before_it_gives_up(peers, shared_path, monkeypatch, caplog):
    comm = peers
    monkeypatch.setattr(liveness, "WARNED_SECONDS", 0.2)
    caplog.set_level(logging.WARNING)
    late = comm.size - 1
    with manager(shared_path / "c", ObjectState("a", 1)) as checkpoints:
        if comm.rank == late:
            time.sleep(1.0)
        checkpoints.save()
    told = [text for text in caplog.messages if "s for other ranks, in" in text]
    if comm.rank <= 1 and comm.rank != late:
        assert "in save() (" in told[0]
        assert "every rank must call it" in told[0]
    else:
        assert told == []
