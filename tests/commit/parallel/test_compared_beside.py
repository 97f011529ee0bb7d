# SPDX-License-Identifier: Apache-2.0
"""Large replicas are compared while root works; nothing unproven is published."""

import errno
import threading

import numpy as np
import pytest
import torch
from torch import nn

from mpi_ckpt import ArrayState, PerRankState, RNGState, TrainState
from mpi_ckpt.engine.sync import replicas
from mpi_ckpt.errors import DivergedError, StageError, StateMismatchError, WriteError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from tests.ranks import assert_same, manager, same_error

BOTH = pytest.mark.parametrize("asynchronous", [False, True])
SIZE = 3000


@pytest.fixture(autouse=True)
def _every_state_is_large(monkeypatch):
    monkeypatch.setattr(replicas, "WAITING_BYTES_MIN", 0)


def states_of(rank, *, sync="root"):
    """Return a state whose leaf "x" differs between ranks, beside one that does not."""
    x = np.full(SIZE, 1.0 + rank)
    return ArrayState("s", {"x": x, "y": np.arange(SIZE)}, sync=sync)


def restored(path, comm, state):
    for array in state.arrays.values():
        array[...] = -1
    with manager(path, state, comm=comm) as mine:
        mine.restore()
    return state.arrays


@BOTH
def test_equal_replicas_are_saved_once_and_digested(comm, shared_path, asynchronous):
    state = states_of(0)
    with manager(shared_path, state, comm=comm, asynchronous=asynchronous) as mine:
        first = mine.save().wait()
        second = mine.save().wait()
        assert first.sync.differing == {}
        if comm.size > 1:
            assert first.sync.bytes_hashed == 2 * 8 * SIZE
        assert second.bytes_reused == 2 * 8 * SIZE
    found = restored(shared_path, comm, state)
    assert (found["x"] == 1).all()
    assert (found["y"] == np.arange(SIZE)).all()


@BOTH
def test_root_wins_and_what_it_has_written_is_its_own(peers, shared_path, asynchronous):
    state = states_of(peers.rank)
    with manager(shared_path, state, comm=peers, asynchronous=asynchronous) as mine:
        pending = mine.save()
        # Equal at once, not when the save is durable.
        assert (state.arrays["x"] == 1).all()
        state.arrays["x"][:] = 9
        report = pending.wait()
        assert report.sync.differing == {"s": ("x",)}
        assert report.sync.bytes_sent == 8 * SIZE
        assert_same(peers, report.sync.differing)
    assert (restored(shared_path, peers, state)["x"] == 1).all()


@BOTH
@pytest.mark.parametrize("mode", ["check", "none"])
def test_diverged_replicas_leave_nothing(peers, shared_path, asynchronous, mode):
    state = states_of(peers.rank, sync=mode)
    with manager(shared_path, state, comm=peers, asynchronous=asynchronous) as mine:
        with same_error(peers, DivergedError, "state 's': x differ"):
            mine.save()
        assert (state.arrays["x"] == 1 + peers.rank).all()
        assert mine.generations() == []
        assert not list(shared_path.glob(".partial-*"))
        state.arrays["x"][:] = 5
        assert mine.save().wait().generation == 1


@BOTH
def test_averages_are_saved(peers, shared_path, asynchronous):
    state = states_of(peers.rank, sync="mean")
    mean = 1 + (peers.size - 1) / 2
    with manager(shared_path, state, comm=peers, asynchronous=asynchronous) as mine:
        mine.save().wait()
        assert np.allclose(state.arrays["x"], mean)
    assert np.allclose(restored(shared_path, peers, state)["x"], mean)


@BOTH
def test_states_of_other_forms_are_refused(peers, shared_path, asynchronous):
    length = 10 if peers.rank == 0 else 20
    state = ArrayState("s", {"x": np.full(length, 1.0)}, sync="root")
    with manager(shared_path, state, comm=peers, asynchronous=asynchronous) as mine:
        with same_error(peers, StateMismatchError, "x F64[10] is saved"):
            mine.save()
        assert mine.generations() == []


def test_a_full_disk_is_one_error_and_the_next_save_works(comm, shared_path, monkeypatch):
    state = states_of(0)
    with manager(shared_path, state, comm=comm) as mine:
        with monkeypatch.context() as patch:
            if comm.rank == 0:
                patch.setattr(filesystem, "write_all", _full)
            with same_error(comm, WriteError, "rank 0", "No space left"):
                mine.save()
        assert not list(shared_path.glob(".partial-*"))
        state.arrays["x"][:] = 2
        assert mine.save().generation == 1
    assert (restored(shared_path, comm, state)["x"] == 2).all()


@BOTH
def test_another_rank_that_cannot_read_its_replica_fails_all(
    peers, shared_path, monkeypatch, asynchronous
):
    state = states_of(0)
    last = peers.size - 1
    with manager(shared_path, state, comm=peers, asynchronous=asynchronous) as mine:
        with monkeypatch.context() as patch:
            if peers.rank == last:
                patch.setattr(replicas, "digest_rest", _unreadable)
                patch.setattr("mpi_ckpt.engine.save.saving.digest_states", _unreadable)
            with same_error(peers, StageError, f"rank {last}", "unreadable"):
                mine.save()
        assert mine.generations() == []
        assert not list(shared_path.glob(".partial-*"))
        assert mine.save().wait().generation == 1


def test_leaves_behind_a_gate_are_digested_before_and_proven_after(comm, shared_path):
    torch.manual_seed(3)
    module = nn.Linear(40, 40)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    state = TrainState(module=module, optimizer=optimizer, overlap=True)
    before = module.weight.detach().clone()
    with manager(shared_path, state, comm=comm, asynchronous=True) as mine:
        mine.save()
        optimizer.step()
        assert not torch.equal(module.weight, before)
    with manager(shared_path, state, comm=comm) as mine:
        mine.restore()
    assert torch.equal(module.weight, before)


@BOTH
def test_what_each_rank_has_of_its_own_reaches_root_as_well(
    comm, shared_path, asynchronous
):
    state, mine = states_of(0), PerRankState("mine", {"n": np.full(50, comm.rank)})
    streams = RNGState()
    given = {"comm": comm, "asynchronous": asynchronous}
    with manager(shared_path, state, mine, streams, **given) as saving:
        saving.save()
        state.arrays["x"][:] = 7
        saving.save().wait()
        mine.value["n"][:] = -1
        saving.restore()
    assert (mine.value["n"] == comm.rank).all()
    assert (state.arrays["x"] == 7).all()


def test_the_next_save_does_not_wait_for_the_removal_of_old_generations(
    comm, shared_path, monkeypatch
):
    may_end = threading.Event()
    remove = CheckpointDirectory.remove

    def slowly(directory, numbers):
        assert may_end.wait(30)
        remove(directory, numbers)

    monkeypatch.setattr(CheckpointDirectory, "remove", slowly)
    state = states_of(0)
    with manager(shared_path, state, comm=comm, asynchronous=True) as mine:
        for number in range(4):  # the fourth gives up the first of three
            state.arrays["x"][:] = number
            mine.save().wait()
        state.arrays["x"][:] = 4
        pending = mine.save()  # returns, though the removal goes on
        state.arrays["x"][:] = 5
        may_end.set()
        assert pending.wait().generation == 5
        assert [one.generation for one in mine.generations()] == [3, 4, 5]
    assert (restored(shared_path, comm, state)["x"] == 4).all()


def _full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def _unreadable(*_):
    raise RuntimeError("unreadable")
