# SPDX-License-Identifier: Apache-2.0
"""Communicators in the order of torch.distributed, and replicas that it trains."""

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from mpi_ckpt import CheckpointManager, ObjectState, TrainState  # noqa: E402
from mpi_ckpt.comm.ordering import Claim, order_ranks  # noqa: E402
from mpi_ckpt.errors import LaunchError  # noqa: E402
from mpi_ckpt.integrations.torch_distributed import (  # noqa: E402
    communicator,
    init_process_group,
)


@pytest.fixture
def started(comm):
    init_process_group("gloo", comm=comm)
    yield
    comm.Barrier()
    dist.destroy_process_group()


@pytest.fixture
def reversed_ranks(comm, shared_path):
    store = dist.FileStore(str(shared_path / "store"), comm.size)
    rank = comm.size - 1 - comm.rank
    dist.init_process_group("gloo", store=store, rank=rank, world_size=comm.size)
    yield
    comm.Barrier()
    dist.destroy_process_group()


def test_torch_gets_the_ranks_of_mpi(comm, started):
    assert (dist.get_rank(), dist.get_world_size()) == (comm.rank, comm.size)
    total = torch.tensor([comm.rank])
    dist.all_reduce(total)
    assert total.item() == sum(range(comm.size))


def test_starting_twice_is_refused_on_all_ranks(comm, started):
    with pytest.raises(LaunchError, match="initialised already"):
        init_process_group("gloo", comm=comm)


def test_ranks_are_those_of_torch(comm, reversed_ranks, shared_path):
    ordered = communicator(comm=comm)
    assert (ordered.rank, ordered.size) == (dist.get_rank(), comm.size)
    value = ObjectState("of-root", [dist.get_rank()], sync="root")
    with CheckpointManager(shared_path / "checkpoints", [value], comm=ordered) as manager:
        assert manager.is_root == (dist.get_rank() == 0)
        manager.save()
    assert value.value == [0]
    ordered.Free()


def test_groups_side_by_side_have_communicators_of_their_own(comm, reversed_ranks):
    evens = dist.new_group(list(range(0, comm.size, 2)))
    odds = dist.new_group(list(range(1, comm.size, 2))) if comm.size > 1 else None
    mine = odds if dist.get_rank() % 2 else evens
    ordered = communicator(mine, comm=comm)
    assert (ordered.rank, ordered.size) == (dist.get_rank(mine), dist.get_world_size(mine))
    ordered.Free()


def test_rank_outside_of_the_group_gets_none(comm, started):
    ordered = communicator(dist.new_group([0]), comm=comm)
    assert (ordered is None) == (comm.rank != 0)
    if ordered is not None:
        assert ordered.size == 1
        ordered.Free()


def test_torch_that_was_not_started_is_refused_on_all_ranks(comm):
    with pytest.raises(LaunchError, match="not initialised, so its ranks are not known"):
        communicator(comm=comm)


def test_ranks_that_do_not_fit_are_refused_on_all_ranks(comm):
    with pytest.raises(
        LaunchError, match=r"MPI and a library .* start it so:\n  rank 0 of"
    ):
        order_ranks(
            comm,
            lambda: Claim(0, comm.rank, comm.size + 1),
            library="a library",
            advice="start it so",
            deadline_seconds=30,
        )


def test_saved_with_the_wrapper_it_fits_a_program_without(comm, started, shared_path):
    torch.manual_seed(comm.rank)  # the wrapper makes them equal
    model = DistributedDataParallel(torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with CheckpointManager(
        shared_path, [TrainState(module=model, optimizer=optimizer)], comm=comm
    ) as manager:
        assert manager.save().sync.differing == {}

    bare = torch.nn.Linear(3, 2)
    other = torch.optim.SGD(bare.parameters(), lr=0.5, momentum=0.9)
    with CheckpointManager(
        shared_path, [TrainState(module=bare, optimizer=other)], comm=comm
    ) as manager:
        assert manager.restore() is not None
    assert torch.equal(bare.weight, model.module.weight)
    assert other.param_groups[0]["lr"] == 0.1
