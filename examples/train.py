# SPDX-License-Identifier: Apache-2.0
"""Trains a small network on handwritten digits, with any number of ranks.

::

    mpirun -n 4 python examples/train.py
    python examples/train.py             # one process works as well

Kill it at any moment, start it again with any number of ranks: it goes on. With the same
number of ranks it ends with the same weights, bit for bit, as if it had never stopped.
(`python -m mpi4py examples/train.py` also ends the job if one rank alone raises.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from digits import Log, count_correct, digest, load_data, make_model
from mpi4py import MPI
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader

from mpi_ckpt import (
    Accumulator,
    ArrayState,
    CheckpointManager,
    ElasticCollate,
    ElasticSampler,
    EpochState,
    KeepLast,
    Options,
    RNGState,
    TrainState,
    remaining_epochs_until,
)

GLOBAL_BATCH = 64  # over all ranks, so any number of them takes the same steps


def train_on(
    batch: list[torch.Tensor],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    comm: MPI.Intracomm,
) -> tuple[float, float]:
    """Take one step; return this rank's summed loss and the mean over all ranks."""
    images, labels = batch
    loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum")
    optimizer.zero_grad()
    loss.backward()
    # Ranks may differ by one sample, or have none: so sums are added up, then divided by
    # all samples; one message with the gradients, the loss and the number of samples.
    gradients = [parameter.grad for parameter in model.parameters()]
    extras = torch.tensor([loss.item(), len(labels)])
    mine = torch.cat([parameters_to_vector(gradients), extras])
    total = torch.empty_like(mine)
    comm.Allreduce(mine.numpy(), total.numpy())
    mean = total / total[-1]
    vector_to_parameters(mean[:-2], gradients)
    optimizer.step()
    return loss.item(), mean[-2].item()


def main() -> None:
    """Train, and go on where the last run was cut off."""
    args = parse_arguments()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)  # sums in one order: the same bits each time
    training, testing = load_data(comm)

    torch.manual_seed(args.seed)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    torch.manual_seed(args.seed + 1 + comm.rank)  # dropout of its own on each rank

    epochs = EpochState()
    sampler = ElasticSampler(len(training), GLOBAL_BATCH, seed=args.seed)
    # A loader draws a seed each time it is iterated. From the global stream that would
    # be one draw more in a run that resumes in mid-epoch: other dropout, other weights.
    loader = DataLoader(
        training,
        batch_sampler=sampler,
        collate_fn=ElasticCollate(training),  # a rank may have no sample of the last batch
        generator=torch.Generator(),
    )
    sums = Accumulator(epochs=epochs)
    ballast = ArrayState("ballast", {"zeros": np.zeros(args.ballast << 20, np.uint8)})
    states = [
        TrainState(module=model, optimizer=optimizer, scheduler=scheduler),
        RNGState(),
        epochs,
        sampler,
        sums,
        ballast,
    ]
    options = Options(interval=args.interval, retention=KeepLast(3))

    with CheckpointManager(args.checkpoints, states, options=options) as manager:
        restored = manager.restore()
        if restored is None:
            manager.sync()  # nothing saved yet: start from root's weights
        log = Log(args.log if manager.is_root else None)
        generation = restored and restored.generation
        log.write("start", ranks=comm.size, generation=generation, step=manager.steps)

        for epoch in remaining_epochs_until(args.epochs, epochs):
            sampler.set_epoch(epoch)
            model.train()
            for batch in loader:
                mine, mean = train_on(batch, model, optimizer, comm)
                sums["loss"] += mine
                sums["samples"] += len(batch[0])
                sampler.record_batch()
                ballast.arrays["zeros"][:1] += 1  # so that it has to be written again
                # The position is complete: from here on a save may come.
                stop = manager.step()
                log.write("step", step=manager.steps, epoch=epoch, loss=mean)
                if stop:
                    log.write("stop", step=manager.steps, code=manager.exit_code)
                    sys.exit(manager.exit_code)
            scheduler.step()
            sums["correct"] += count_correct(model, testing, comm)
            with sums.synchronized():  # over all ranks, and all runs of this epoch
                samples = sums["samples"]
                results = {
                    "loss": sums["loss"] / samples,
                    "accuracy": sums["correct"] / len(testing),
                }
                sums.clear()
            log.write("epoch", step=manager.steps, epoch=epoch, samples=samples, **results)
            if manager.is_root:
                print(f"epoch {epoch:3d}", *(f"{k} {v:.4f}" for k, v in results.items()))

        manager.save()  # started once more, it has nothing left to do
        log.write("end", step=manager.steps, digest=digest(model))
        if manager.is_root:
            print(f"weights {digest(model)[:16]} after {manager.steps} steps")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--interval", type=int, default=20, help="steps between saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file for events, as JSON lines")
    parser.add_argument(
        "--ballast",
        type=int,
        default=0,
        metavar="MIB",
        help="save so much more, to see what a save of a large model is like",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
