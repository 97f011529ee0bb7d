# SPDX-License-Identifier: Apache-2.0
"""Trains a network whose parameters are cut over the ranks: FSDP2 and tensor parallel.

::

    mpirun -n 4 python examples/fsdp_train.py

Kill it at any moment, start it again with any number of ranks: it goes on. Parameters and
Adam's averages are saved by the ranks that have them, and each rank restores what it has
now, however they were cut before.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from digits import Log, load_data
from mpi4py import MPI
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from mpi_ckpt import CheckpointManager, KeepLast, Options, TrainState
from mpi_ckpt.integrations.torch_distributed import communicator, init_process_group

if TYPE_CHECKING:
    from torch.utils.data import TensorDataset

GLOBAL_BATCH = 60  # over all ranks: a multiple of the ways to cut it


def main() -> None:
    """Train, and go on where the last run was cut off."""
    args = parse_arguments()
    torch.set_num_threads(1)
    init_process_group("gloo")  # "nccl" where each rank has a GPU of its own
    training, _ = load_data(MPI.COMM_WORLD)
    ranks = dist.get_world_size()
    across = 2 if ranks % 2 == 0 else 1  # a layer is cut over so many ranks
    mesh = init_device_mesh(
        "cpu", (ranks // across, across), mesh_dim_names=("data", "layer")
    )

    torch.manual_seed(0)
    model = make_cut_model(mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    state = TrainState(module=model, optimizer=optimizer)
    options = Options(interval=args.interval, retention=KeepLast(3))
    with CheckpointManager(
        args.checkpoints, [state], comm=communicator(), options=options
    ) as manager:
        manager.restore()
        log = Log(args.log if manager.is_root else None)
        log.write("start", ranks=ranks, step=manager.steps)
        if manager.is_root:
            print(f"step {manager.steps:4d} on {ranks} ranks, {across} to a layer")
        while manager.steps < args.steps:
            loss = train_on(batch_of(training, manager.steps, mesh), model, optimizer)
            stop = manager.step()
            log.write("step", step=manager.steps, loss=loss)
            if manager.is_root and manager.steps % args.interval == 0:
                print(f"step {manager.steps:4d} loss {loss:.4f}")
            if stop:
                log.write("stop", step=manager.steps, code=manager.exit_code)
                sys.exit(manager.exit_code)
        manager.save()  # started once more, it has nothing left to do
        log.write("end", step=manager.steps)
    dist.destroy_process_group()


def make_cut_model(mesh: DeviceMesh) -> torch.nn.Module:
    """Make a network: each layer cut over the ranks of a row, and that over the rows."""
    layers = torch.nn.Linear(64, 130), torch.nn.ReLU(), torch.nn.Linear(130, 10)
    model = torch.nn.Sequential(*layers, torch.nn.LogSoftmax(dim=1))
    if mesh["layer"].size() > 1:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["layer"], plan)
    fully_shard(model, mesh=mesh["data"])
    return model


def batch_of(
    data: TensorDataset, step: int, mesh: DeviceMesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's share of the samples of a step: the same for any cut."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(step))
    share = order[:GLOBAL_BATCH].tensor_split(mesh["data"].size())
    images, labels = data[share[mesh["data"].get_local_rank()]]
    return images, labels


def train_on(
    batch: tuple[torch.Tensor, torch.Tensor],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> float:
    """Take one step, and return this rank's loss."""
    images, labels = batch
    loss = torch.nn.functional.nll_loss(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("fsdp-checkpoints"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--interval", type=int, default=20, help="steps between saves")
    parser.add_argument("--log", type=Path, help="file for events, as JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
