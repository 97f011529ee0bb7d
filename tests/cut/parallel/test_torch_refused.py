# SPDX-License-Identifier: Apache-2.0
"""What of torch's cut tensors cannot be saved or restored: one error on all ranks."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from mpi_ckpt import ModuleState, ObjectState, OptimizerState, TrainState
from mpi_ckpt.errors import (
    DivergedError,
    RegistrationError,
    StageError,
    StateMismatchError,
)
from mpi_ckpt.integrations.torch_distributed import init_process_group
from tests.cut.trainings import KINDS, adam
from tests.ranks import manager, same_error

# The first mesh of a process takes seconds.
pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def started(peers):
    init_process_group("gloo", comm=peers)
    yield
    peers.Barrier()
    dist.destroy_process_group()


def refused(peers, root, state, error, *parts):
    """Require a save to fail alike on all ranks, and to leave nothing."""
    ours = manager(root, state, comm=peers)
    with same_error(peers, error, f"'{state.name}'", *parts):
        ours.save()
    assert ours.generations() == []
    ours.close()


def module_with(tensor):
    module = nn.Linear(2, 2)
    module.register_buffer("part", tensor)
    return ModuleState("m", module)


def test_flat_parameters(peers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: it is deprecated, and slow here
        from torch.distributed.fsdp import FullyShardedDataParallel

        module = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"))
    with same_error(
        peers, RegistrationError, "state 'm'", "torch.distributed.fsdp.fully_shard"
    ):
        ModuleState("m", module)


def test_partial_results(peers, shared_path):
    mesh = init_device_mesh("cpu", (peers.size,))
    sums = DTensor.from_local(torch.arange(12.0), mesh, [Partial()])
    advice = "redistribute() it to Shard or Replicate"
    refused(peers, shared_path, module_with(sums), StageError, "'part'", advice)
    state = ObjectState("o", {"part": sums})
    refused(peers, shared_path, state, StageError, "'part'", advice)


def test_sharded_tensors(peers, shared_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed._shard import sharded_tensor
        from torch.distributed._shard.sharding_spec import ChunkShardingSpec

        places = [f"rank:{rank}/cpu" for rank in range(peers.size)]
        rows = sharded_tensor.zeros(ChunkShardingSpec(0, places), 8, 2)
    state = ObjectState("o", {"part": rows})
    refused(peers, shared_path, state, StageError, "'part'", "make it a DTensor")


def test_quantized_tensors(peers, shared_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8)
    refused(peers, shared_path, module_with(part), StageError, "'part'", "dequantize()")


def test_a_mesh_with_ranks_that_the_manager_lacks(peers, shared_path):
    mesh = init_device_mesh("cpu", (peers.size,))
    part = distribute_tensor(torch.ones(2 * peers.size), mesh, [Shard(0)])
    pair = peers.Split(int(peers.rank == peers.size - 1), peers.rank)
    text = "ranks outside of the manager's communicator"
    root = shared_path / str(int(peers.rank == peers.size - 1))
    refused(pair, root, module_with(part), StageError, "'part'", text)
    pair.Free()


def test_a_mesh_without_all_ranks_is_no_hindrance(peers, shared_path):
    mesh = DeviceMesh("cpu", list(range(peers.size - 1)))
    part = distribute_tensor(torch.arange(5.0), mesh, [Shard(0)])
    module = nn.Module()
    module.register_buffer("part", part)
    with manager(shared_path, ModuleState("m", module), comm=peers) as ours:
        ours.save()
        if peers.rank < peers.size - 1:
            part.to_local().zero_()
        ours.restore()
    mine = torch.arange(5.0).chunk(peers.size - 1)
    if peers.rank < len(mine):
        assert part.to_local().equal(mine[peers.rank])


class TestStages:
    @pytest.fixture
    def even(self, peers):
        if peers.size % 2:
            pytest.skip("needs an even number of ranks")
        return peers

    def state_of(self, training):
        return TrainState(module=training.net, optimizer=training.optimizer)

    def test_a_tensor_that_is_whole_and_on_one_stage_only(self, even, shared_path):
        training = KINDS["stage"](0)
        training.net.register_buffer(f"of_{even.rank}", torch.ones(2))
        state = self.state_of(training)
        refused(even, shared_path, state, StateMismatchError, "of_1")

    def test_a_tensor_that_is_whole_and_on_root_only(self, even, shared_path):
        training = KINDS["stage"](0)
        if even.rank == 0:
            training.net.register_buffer("mean", torch.ones(2))
        state, text = self.state_of(training), "mean F32[2] is on root, not here"
        refused(even, shared_path, state, StateMismatchError, text)

    @pytest.mark.parametrize("sync", ["root", "none"])
    def test_layers_of_one_name_on_two_stages(self, even, shared_path, sync):
        half = even.size // 2
        mesh = init_device_mesh("cpu", (2, half), mesh_dim_names=("stage", "data"))
        torch.manual_seed(mesh["stage"].get_local_rank())
        layer = nn.Linear(4, 6)
        fully_shard(layer, mesh=mesh["data"])
        where = f"rank {half}"
        state = ModuleState("m", layer, sync=sync)
        refused(even, shared_path, state, DivergedError, "'weight'", where)

    def test_parameters_without_names(self, even, shared_path):
        training = KINDS["stage"](0)
        training.step(1)
        state = OptimizerState("o", training.optimizer)
        refused(even, shared_path, state, StageError, "model.named_parameters()")

    def test_a_layer_that_no_stage_has(self, even, shared_path):
        training = KINDS["stage"](0)
        with manager(shared_path, self.state_of(training), comm=even) as ours:
            ours.save()
        other = KINDS["stage"](0)
        if "1" in other.net:
            del other.net["1"]
            other.optimizer = adam(other.net)
        ours = manager(shared_path, self.state_of(other), comm=even)
        with same_error(
            even, StateMismatchError, "module/1.weight F32[13, 4] is saved", "any"
        ):
            ours.restore()
        ours.close()

    def test_a_layer_of_a_model_that_was_whole_and_that_no_stage_has(
        self, even, shared_path
    ):
        net = KINDS["plain"](0).net
        net.add_module("more", nn.Linear(2, 3))
        with manager(shared_path, ModuleState("m", net), comm=even) as ours:
            ours.save()
        stage = ModuleState("m", KINDS["stage"](0).net)
        ours = manager(shared_path, stage, comm=even)
        with same_error(even, StateMismatchError, "more.weight F32[3, 2]", "on any rank"):
            ours.restore()
        ours.close()
