# SPDX-License-Identifier: Apache-2.0
"""Trains with torch's DistributedDataParallel: gradients by torch, checkpoints by MPI.

::

    mpirun -n 2 python examples/ddp_train.py

Kill it at any moment, start it again with any number of ranks: it goes on. What mpi_ckpt
adds to a plain script are the sampler, `states`, and the block of the manager.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from digits import Log, digest, load_data, make_model
from mpi4py import MPI
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from mpi_ckpt import (
    CheckpointManager,
    ElasticSampler,
    EpochState,
    KeepLast,
    Options,
    RNGState,
    TrainState,
    remaining_epochs_until,
)
from mpi_ckpt.integrations.torch_distributed import communicator, init_process_group

GLOBAL_BATCH = 64  # over all ranks, so any number of them takes the same steps


def main() -> None:
    """Train, and go on where the last run was cut off."""
    args = parse_arguments()
    torch.set_num_threads(1)  # sums in one order: the same bits each time
    init_process_group("gloo")  # "nccl" where each rank has a GPU of its own
    rank = dist.get_rank()
    training, _ = load_data(MPI.COMM_WORLD)

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    torch.manual_seed(args.seed + 1 + rank)  # dropout of its own on each rank

    epochs = EpochState()
    sampler = ElasticSampler(len(training), GLOBAL_BATCH, seed=args.seed)
    # A generator of its own: from the global stream a resumed run would draw once more.
    loader = DataLoader(training, batch_sampler=sampler, generator=torch.Generator())

    states = [
        TrainState(module=model, optimizer=optimizer, scheduler=scheduler),
        RNGState(),
        epochs,
        sampler,
    ]
    options = Options(interval=args.interval, retention=KeepLast(3))
    with CheckpointManager(
        args.checkpoints, states, comm=communicator(), options=options
    ) as manager:
        restored = manager.restore()
        if restored is None:
            manager.sync()  # nothing saved yet: start from root's weights
        log = Log(args.log if manager.is_root else None)
        log.write("start", ranks=dist.get_world_size(), step=manager.steps)

        for epoch in remaining_epochs_until(args.epochs, epochs):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()  # averages the gradients over all ranks
                optimizer.step()
                sampler.record_batch()
                # The position is complete: from here on a save may come.
                stop = manager.step()
                log.write("step", step=manager.steps, epoch=epoch, loss=loss.item())
                if stop:
                    log.write("stop", step=manager.steps, code=manager.exit_code)
                    sys.exit(manager.exit_code)
            scheduler.step()
            if manager.is_root:
                print(f"epoch {epoch:3d} loss {loss.item():.4f}")

        manager.save()  # started once more, it has nothing left to do
        log.write("end", step=manager.steps, digest=digest(model.module))
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--interval", type=int, default=20, help="steps between saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file for events, as JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
