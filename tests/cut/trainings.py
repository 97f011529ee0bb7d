# SPDX-License-Identifier: Apache-2.0
"""Small trainings whose parameters or optimizer state torch cuts over the ranks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

SAMPLES = 24  # of a step, over all ranks


@dataclass
class Training:
    """A model with its optimizer, and which of the samples are this rank's.

    Attributes:
        net: The model without a wrapper around it.
        model: What is called: the model or the wrapper around it.
        optimizer: Its optimizer.
        share: Number of this rank's share of the samples, and number of the shares.
    """

    net: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    share: tuple[int, int] = (0, 1)

    def step(self, number: int) -> None:
        """Take the step of a number: the same samples for any number of ranks."""
        drawn = torch.Generator().manual_seed(number)
        inputs = torch.rand(SAMPLES, 4, generator=drawn)
        inputs = inputs.to(next(self.net.parameters()).dtype)
        mine = inputs.tensor_split(self.share[1])[self.share[0]]
        self.optimizer.zero_grad()
        ((self.model(mine) - mine.repeat(1, 2)) ** 2).mean().backward()
        self.optimizer.step()


def make_net(seed: int, dtype: torch.dtype) -> nn.Sequential:
    """Make a network of layers whose rows no number of ranks from 2 to 6 divides."""
    torch.manual_seed(seed)
    layers = nn.LayerNorm(4), nn.Linear(4, 13), nn.Tanh(), nn.Linear(13, 8)
    return nn.Sequential(*layers).to(dtype)


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.05)


def plain(seed: int, dtype: torch.dtype = torch.float32) -> Training:
    """One rank that has everything."""
    net = make_net(seed, dtype)
    return Training(net, net, adam(net))


def replicated(seed: int, dtype: torch.dtype = torch.float32) -> Training:
    """DistributedDataParallel."""
    net = make_net(seed, dtype)
    return Training(net, DistributedDataParallel(net), adam(net), data_share())


def sharded(seed: int, dtype: torch.dtype = torch.float32) -> Training:
    """FSDP2 over all ranks, layer by layer."""
    net = make_net(seed, dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net[1], net):
        fully_shard(part, mesh=mesh)
    return Training(net, net, adam(net), data_share())


def hybrid(seed: int, dtype: torch.dtype = torch.float32) -> Training:
    """Two copies, each sharded by FSDP2 over half of the ranks."""
    net = make_net(seed, dtype)
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, half), mesh_dim_names=("copies", "parts"))
    fully_shard(net, mesh=mesh)
    return Training(net, net, adam(net), data_share())


def tensor_parallel(seed: int, dtype: torch.dtype = torch.float32) -> Training:
    """Layers cut over all ranks; the normalization is whole on each."""
    net = make_net(seed, dtype)
    cut_layers(net, init_device_mesh("cpu", (dist.get_world_size(),)))
    return Training(net, net, adam(net))


def grid(seed: int, dtype: torch.dtype = torch.float32) -> Training:
    """Layers cut over two ranks, and each part by FSDP2 over the pairs."""
    net = make_net(seed, dtype)
    pairs = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (pairs, 2), mesh_dim_names=("data", "layer"))
    cut_layers(net, mesh["layer"])
    fully_shard(net, mesh=mesh["data"])
    return Training(net, net, adam(net), (mesh["data"].get_local_rank(), pairs))


def dealt_out(seed: int, dtype: torch.dtype = torch.float32) -> Training:
    """Each rank has the optimizer state of some parameters: ZeRO, stage 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch to itself
        from torch.distributed.optim import ZeroRedundancyOptimizer

    net = make_net(seed, dtype)
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.05)
    return Training(net, DistributedDataParallel(net), optimizer, data_share())


class StageTraining(Training):
    """Some layers of a network; each is trained by itself, to fold its input."""

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        for layer in self.net.values():
            drawn = torch.Generator().manual_seed(number)
            inputs = torch.rand(SAMPLES, layer.weight.shape[-1], generator=drawn)
            mine = inputs.tensor_split(self.share[1])[self.share[0]]
            (layer(mine) ** 2).mean().backward()
        self.optimizer.step()


def stage(seed: int, dtype: torch.dtype = torch.float32) -> Training:
    """Two stages of a pipeline, each sharded by FSDP2 over half of the ranks."""
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, half), mesh_dim_names=("stage", "data"))
    layers = ("0", "1") if mesh["stage"].get_local_rank() == 0 else ("3",)
    whole = make_net(seed, dtype)
    net = nn.ModuleDict({name: whole.get_submodule(name) for name in layers})
    for layer in net.values():
        fully_shard(layer, mesh=mesh["data"])
    share = (mesh["data"].get_local_rank(), half)
    return StageTraining(net, net, adam(net), share)


KINDS = {
    "plain": plain,
    "ddp": replicated,
    "fsdp": sharded,
    "hsdp": hybrid,
    "tp": tensor_parallel,
    "grid": grid,
    "zero": dealt_out,
    "stage": stage,
}


def cut_layers(net: nn.Module, mesh: object) -> None:
    # Tensors that know their whole shape stay between the layers: 13 is uneven.
    plan = {"1": ColwiseParallel(use_local_output=False), "3": RowwiseParallel()}
    parallelize_module(net, mesh, plan)


def data_share() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def whole_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Return the whole of each parameter and optimizer state, from what the ranks have.

    Collective. Put together from the local tensors, by what the placements mean.
    """
    mine = {name: local_part(tensor) for name, tensor in live_tensors(training).items()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {}
    for name in sorted({name for one in everyone for name in one}):
        parts = [one[name] for one in everyone if name in one]
        found[name] = join_parts(parts)
    return found


def tensors_by_torch(training: Training) -> dict[str, torch.Tensor]:
    """Return the whole of those tensors that torch itself joins. Collective.

    It joins uneven parts wrongly that FSDP2 has cut from parts of tensor parallelism.
    """
    return {
        name: tensor.full_tensor()
        for name, tensor in live_tensors(training).items()
        if isinstance(tensor, DTensor)
        and not any(isinstance(one, _StridedShard) for one in tensor.placements)
    }


def live_tensors(training: Training) -> dict[str, torch.Tensor]:
    """Return this rank's tensors: of the model, and of its optimizer by parameter."""
    tensors = {f"net/{name}": t for name, t in training.net.state_dict().items()}
    state = getattr(training.optimizer, "optim", training.optimizer).state
    for name, parameter in training.net.named_parameters():
        for key, value in state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    return tensors


def local_part(tensor: torch.Tensor) -> tuple:
    """Return coordinate, cut dimension for each mesh dimension, and local tensor."""
    if not isinstance(tensor, DTensor):
        return (), (), tensor.detach()
    cuts = tuple(getattr(one, "dim", None) for one in tensor.placements)
    coordinate = tuple(tensor.device_mesh.get_coordinate())
    return coordinate, cuts, tensor.detach().to_local()


def join_parts(parts: list[tuple]) -> torch.Tensor:
    """Join local tensors: FSDP2 cuts what tensor parallelism has cut, so it comes first."""
    by_place: dict[tuple, list] = {}
    for coordinate, _, local in parts:
        by_place.setdefault(coordinate, []).append(local)
    (cuts,) = {cut for _, cut, _ in parts}
    joined = {place: same(copies) for place, copies in by_place.items()}
    for cut in cuts:
        rows: dict[tuple, list] = {}
        for place in sorted(joined):
            rows.setdefault(place[1:], []).append(joined[place])
        joined = {
            place: same(row) if cut is None else torch.cat(row, cut)
            for place, row in rows.items()
        }
    (whole,) = joined.values()
    return whole


def same(copies: list[torch.Tensor]) -> torch.Tensor:
    assert all(one.dtype == copies[0].dtype and one.equal(copies[0]) for one in copies)
    return copies[0]
