# SPDX-License-Identifier: Apache-2.0
"""A communicator with Horovod's ranks, found by what a stand-in for Horovod says."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from mpi_ckpt import ArrayState
from mpi_ckpt.errors import LaunchError, OptionsError
from mpi_ckpt.integrations import horovod
from tests.horovod_stand_in import Horovod
from tests.ranks import assert_same, manager, same_error


class ProcessSet(SimpleNamespace):
    def included(self):
        return self.comm != MPI.COMM_NULL


def process_set(comm, ranks):
    """Return a set of ranks that was added to a Horovod with all ranks."""
    group = comm.group.Incl(ranks)
    return ProcessSet(process_set_id=1, ranks=ranks, comm=comm.Create(group))


@pytest.fixture
def run(monkeypatch):
    """Have Horovod run on a communicator; on None it is not initialised."""

    def run(comm, **options):
        monkeypatch.setitem(sys.modules, "horovod.torch", Horovod(comm, **options))

    return run


def test_without_horovod_it_is_the_world_or_what_was_given(comm, run):
    assert horovod.communicator() is MPI.COMM_WORLD
    run(None)
    assert horovod.communicator() is MPI.COMM_WORLD
    assert horovod.communicator(MPI.COMM_SELF) is MPI.COMM_SELF
    with same_error(comm, LaunchError, "Horovod is not initialised"):
        horovod.communicator(process_set=ProcessSet(process_set_id=1))


def test_the_same_ranks_in_the_same_order(comm, run):
    run(comm)
    assert horovod.communicator() is MPI.COMM_WORLD
    assert horovod.communicator(comm) is comm
    everyone = ProcessSet(process_set_id=0, ranks=list(range(comm.size)))
    assert horovod.communicator(process_set=everyone) is MPI.COMM_WORLD
    assert horovod.broadcast_object(comm.rank, 0, process_set=everyone) == 0


def test_the_same_ranks_in_another_order(comm, run):
    turned = comm.Split(0, -comm.rank)
    run(turned)
    found = horovod.communicator()
    assert (found.rank, found.size) == (turned.rank, turned.size)
    assert horovod.broadcast_object(comm.rank, 0) == comm.size - 1
    given = {"rank": comm.rank}
    horovod.broadcast_parameters(given, comm.size - 1)
    assert given == {"rank": 0}


def test_some_of_the_ranks_are_found_by_horovod(comm, run):
    part = comm.Split(comm.rank % 2, -comm.rank)
    run(part)
    found = horovod.communicator()
    assert (found.rank, found.size) == (part.rank, part.size)
    assert found.allgather(comm.rank) == part.allgather(comm.rank)
    assert horovod.broadcast_object(comm.rank, 0) == part.bcast(comm.rank, 0)
    assert horovod.communicator(part) is part


def test_a_process_set(peers, run, shared_path):
    run(peers)
    ranks = [0, peers.size - 1]
    chosen = process_set(peers, ranks)
    if peers.rank not in ranks:
        with pytest.raises(LaunchError, match="this rank is not in the process set"):
            horovod.communicator(process_set=chosen)
        return
    found = horovod.communicator(process_set=chosen)
    assert found.allgather(peers.rank) == ranks
    # Fewer than Horovod has, and all the same right for a manager.
    state = ArrayState("x", {"x": np.full(3, found.rank)}, sync="root")
    with manager(shared_path / "set", state, comm=found) as checkpoints:
        checkpoints.save(step=4)
    assert state.arrays["x"].tolist() == [0] * 3
    found.Free()
    # Roots are Horovod's ranks, not those in the set.
    assert horovod.broadcast_object(peers.rank, ranks[1], process_set=chosen) == ranks[1]
    gathered = horovod.allgather_object(peers.rank, process_set=chosen)
    assert gathered == ranks
    with same_error(chosen.comm, OptionsError, f"root_rank is {peers.size}, the ranks are"):
        horovod.broadcast_object(0, peers.size, process_set=chosen)
    with same_error(chosen.comm, LaunchError, "or the process set, not both"):
        horovod.communicator(peers, chosen)


def test_horovod_without_mpi_is_refused_everywhere(comm, run, shared_path):
    run(comm, mpi=False)
    for act in (
        horovod.communicator,
        lambda: horovod.broadcast_object(1),
        lambda: manager(shared_path / "root"),
    ):
        with same_error(comm, LaunchError, f"Horovod runs {comm.size} ranks (without MPI)"):
            act()


def test_horovod_on_some_ranks_only_is_refused_on_all(peers, run, shared_path):
    run(MPI.COMM_SELF if peers.rank == 0 else None)
    with same_error(peers, LaunchError, "rank 0: Horovod runs 1 ranks (over MPI)"):
        manager(shared_path / "root")
    # The next communicator is free of it.
    run(peers)
    with manager(shared_path / "root") as checkpoints:
        assert checkpoints.generations() == []


def test_ranks_that_are_not_horovods_are_refused(peers, run):
    # Two jobs of one rank each would both be its rank 0.
    run(SimpleNamespace(rank=0, size=peers.size))
    with same_error(
        peers,
        LaunchError,
        "MPI and Horovod disagree about the ranks of the job",
        "ranks 0 and 1 of MPI are both rank 0 there",
    ):
        horovod.communicator(peers)


def test_horovod_of_other_ranks_than_the_given_are_refused(peers, run):
    run(SimpleNamespace(rank=peers.rank, size=peers.size + 1))
    with same_error(peers, LaunchError, f"Horovod runs {peers.size + 1} ranks"):
        horovod.communicator(peers)


def test_a_front_end_without_tensors_asks_for_the_communicator(peers, monkeypatch):
    half = peers.Split(peers.rank, 0)
    tensorflow = SimpleNamespace(
        is_initialized=lambda: True,
        mpi_enabled=lambda: True,
        rank=lambda: half.rank,
        size=lambda: half.size,
    )
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", tensorflow)
    with same_error(peers, LaunchError, "give comm=, the communicator that hvd.init"):
        horovod.communicator()
    assert horovod.broadcast_object(peers.rank, comm=half) == peers.rank
    assert_same(peers, "done")
