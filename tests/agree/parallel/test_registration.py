# SPDX-License-Identifier: Apache-2.0
"""Ranks that were given different states or options are told so, all of them."""

import sys
import types

import numpy as np
import pytest

from mpi_ckpt import (
    IO,
    ArrayState,
    CheckpointManager,
    ElasticSampler,
    KeepEvery,
    KeepLast,
    ObjectState,
    Options,
    State,
    StopWhen,
)
from mpi_ckpt.engine import abort
from mpi_ckpt.errors import LaunchError, OptionsError, RegistrationError
from tests.ranks import manager, same_error


def states(*names):
    return [ObjectState(name, 1) for name in names]


def last(comm):
    return comm.rank == comm.size - 1


def make(root, given):
    manager(root, *given).close()


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (["a", "b"], ["a", "c"]),
        (["a", "b"], ["b", "a"]),
        (["a", "b"], ["a"]),
        ([], ["a"]),
    ],
    ids=["name", "order", "number", "none"],
)
def test_states_that_differ_between_ranks(peers, shared_path, here, there):
    mine = there if last(peers) else here
    with same_error(
        peers,
        RegistrationError,
        "the ranks have different states, or another order",
        f"rank {peers.size - 1} on ",
        f" has {there}, root has {here}",
    ) as caught:
        make(shared_path, states(*mine))
    assert isinstance(caught.error, ValueError)
    assert "preemption_signals" not in str(caught.error)  # what is equal is not shown
    assert len(caught.error.problems) == 1
    with manager(shared_path, *states(*here, "more")) as checkpoints:
        checkpoints.save()


@pytest.mark.parametrize(
    "names", [["a", "a"], ["a", "A"], ["é", "e\N{COMBINING ACUTE ACCENT}"]]
)
def test_names_that_collide(comm, shared_path, names):
    with same_error(comm, RegistrationError, "state names collide", *names):
        make(shared_path, states(*names))


def test_a_collision_on_one_rank(comm, shared_path):
    names = ["a", "b", "a"] if last(comm) else ["a", "b", "c"]
    text = f"rank {comm.size - 1} of {comm.size}"
    with same_error(comm, RegistrationError, text, "'a' is given twice"):
        make(shared_path, states(*names))


def test_something_that_is_no_state(comm, shared_path):
    given = ["text"] if last(comm) else states("a")
    with same_error(comm, RegistrationError, "'text' is not a State"):
        make(shared_path, given)


@pytest.mark.parametrize(
    ("field", "here", "there"),
    [
        ("retention", KeepLast(2), KeepLast(3)),
        ("retention", KeepLast(2), KeepLast(2) | KeepEvery(5)),
        ("interval", 5, 6),
        ("io", IO(message_bytes=1 << 20), IO(message_bytes=64)),
        ("io", IO(message_bytes=64), IO(message_bytes=1 << 20)),
        ("deadline_seconds", 10.0, 20.0),
        ("strict", True, False),
        ("stop", StopWhen(exit_code=0), StopWhen(exit_code=1)),
    ],
)
def test_options_that_differ_between_ranks(peers, shared_path, field, here, there):
    options = {field: there if last(peers) else here}
    with same_error(
        peers,
        OptionsError,
        "the ranks were given different options",
        f"rank {peers.size - 1} on ",
        f"{field}={there!r}",
        f"{field}={here!r}",
    ) as caught:
        manager(shared_path, *states("a"), **{"deadline_seconds": 15.0, **options}).close()
    assert isinstance(caught.error, ValueError)


def test_options_of_the_environment_may_differ_and_are_told(peers, shared_path):
    options = Options.from_env({"MPI_CKPT_KEEP_LAST": "7"} if last(peers) else {})
    with same_error(peers, OptionsError, "retention=KeepLast(count=7)"):
        CheckpointManager(shared_path, states("a"), options=options).close()


@pytest.mark.parametrize("call", ["save", "restore", "sync"])
def test_only_what_is_there(comm, shared_path, call):
    with manager(shared_path, *states("a", "b")) as checkpoints:
        with same_error(comm, RegistrationError, "there are no states ['x', 'y']"):
            getattr(checkpoints, call)(only=["a", "y", "x"])
        only = ["z"] if last(comm) else ["a"]
        with same_error(comm, RegistrationError, "there are no states ['z']"):
            getattr(checkpoints, call)(only=only)
        getattr(checkpoints, call)(only=["b", "a"])


@pytest.mark.parametrize("call", ["save", "restore", "sync"])
def test_only_the_same_on_all_ranks(peers, shared_path, call):
    only, text = ["b"] if last(peers) else ["a"], "has ['b'], root has ['a']"
    with (
        manager(shared_path, *states("a", "b")) as checkpoints,
        same_error(peers, RegistrationError, text),
    ):
        getattr(checkpoints, call)(only=only)


def test_states_added_and_removed_later(comm, shared_path):
    with manager(shared_path, *states("a", "b")) as checkpoints:
        checkpoints.add(ObjectState("c", 3))
        checkpoints.remove("a")
        assert checkpoints.names == ["b", "c"]
        checkpoints.save()
        with pytest.raises(RegistrationError, match="there is no state 'a'"):
            checkpoints.remove("a")
        with pytest.raises(RegistrationError, match="'c' is given twice"):
            checkpoints.add(ObjectState("c", 4))
        assert checkpoints.names == ["b", "c"]
        if comm.size > 1:
            if last(comm):
                checkpoints.add(ObjectState("mine alone", 4))
            with same_error(comm, RegistrationError, "'mine alone'"):
                checkpoints.save()
            if last(comm):
                checkpoints.remove("mine alone")
        assert checkpoints.save().generation == 2


def test_skip_the_same_on_all_ranks(peers, shared_path):
    given = states("a", "b")
    given[1].skip = last(peers)
    with manager(shared_path, *given) as checkpoints:
        with same_error(peers, RegistrationError, "has ['a'], root has ['a', 'b']"):
            checkpoints.save()
        given[1].skip = False
        checkpoints.save()


def test_more_ranks_than_a_batch_has_samples(comm, shared_path):
    sampler = ElasticSampler(100, comm.size)
    make(shared_path, [sampler])
    if comm.size > 1:
        few = ElasticSampler(100, comm.size - 1)
        with same_error(comm, OptionsError, f"{comm.size} ranks cannot share batches"):
            make(shared_path, [few])


def test_a_generator_of_states_that_fails_on_all(comm, shared_path):
    def given():
        yield ObjectState("a", 1)
        yield ObjectState("", 1)

    with same_error(comm, RegistrationError, "must not be empty"):
        make(shared_path, given())


class FakeHorovod(types.ModuleType):
    """Says what Horovod would, and keeps count of being asked."""

    def __init__(self, size, *, initialized=True, mpi=True):
        super().__init__("horovod.torch")
        self.answers = {
            "is_initialized": lambda: initialized,
            "mpi_enabled": lambda: mpi,
            "size": lambda: size,
        }

    def __getattr__(self, name):
        return self.__dict__["answers"][name]


@pytest.mark.parametrize("name", ["horovod.torch", "horovod.tensorflow"])
def test_a_horovod_of_another_size(comm, shared_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, FakeHorovod(comm.size + 1))
    with same_error(
        comm,
        LaunchError,
        f"Horovod runs {comm.size + 1} ranks (over MPI), the communicator has {comm.size}",
    ):
        make(shared_path, states("a"))


def test_a_horovod_without_mpi(comm, shared_path, monkeypatch):
    fake = FakeHorovod(comm.size, mpi=False)
    monkeypatch.setitem(sys.modules, "horovod.torch", fake)
    with same_error(comm, LaunchError, "(without MPI)", "without --gloo"):
        make(shared_path, states("a"))


def test_a_horovod_that_fits(comm, shared_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod.torch", FakeHorovod(comm.size))
    make(shared_path, states("a"))
    fake = FakeHorovod(99, initialized=False)
    monkeypatch.setitem(sys.modules, "horovod.torch", fake)
    make(shared_path, states("a"))


def test_a_launcher_that_started_more_than_mpi_sees(comm, shared_path, monkeypatch):
    for name in (
        "OMPI_COMM_WORLD_SIZE",
        "PMI_SIZE",
        "SLURM_STEP_NUM_TASKS",
        "HOROVOD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    if comm.size == 1:
        with pytest.raises(LaunchError, match="srun started this process as rank 3 of 8"):
            make(shared_path, states("a"))
    else:
        make(shared_path, states("a"))


class Counting(State):
    """Notes what is asked of it."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def save(self, fileobj):
        self.calls.append("save")

    def load(self, fileobj):
        self.calls.append("load")

    def sync(self):
        self.calls.append("sync")


def test_who_is_called_for_what(comm, shared_path):
    state, array = Counting("plain"), ArrayState("array", {"x": np.ones(2)})
    with manager(shared_path, state, array) as checkpoints:
        checkpoints.save()
        checkpoints.restore()
        checkpoints.restore(only=["array"])
        checkpoints.save(only=["array"])
        checkpoints.restore(only=["plain"])
    on_root = ["sync", "save", "load", "load"]
    assert state.calls == (on_root if comm.rank == 0 else ["sync", "load", "load"])


@pytest.mark.parametrize("aborts", [True, False])
def test_ending_the_job_for_one_rank_can_be_left_off(comm, shared_path, aborts):
    with manager(shared_path, abort_on_error=aborts) as checkpoints:
        watches = checkpoints._abort in abort._HOOK.armed
    assert watches == (aborts and comm.size > 1)
