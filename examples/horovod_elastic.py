# SPDX-License-Identifier: Apache-2.0
"""A training in the manner of Horovod elastic, whose commits outlive the job.

::

    mpirun -n 2 python examples/horovod_elastic.py

Kill it at any moment and start it again, with any number of ranks: it goes on from the last
durable commit. With the same number it ends with the same weights, bit for bit. Without
Horovod the gradients are averaged by mpi4py, and everything else is as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from mpi4py import MPI  # before Horovod is initialised, so that it does not own MPI
from torch.utils.data import DataLoader, TensorDataset

from mpi_ckpt import Options
from mpi_ckpt.integrations.horovod import ElasticSampler, TorchState, configure, run

try:
    import horovod.torch as hvd
except ImportError:
    hvd = None

SAMPLES = 600
BATCH = 10  # of one rank
RATE = 0.02  # for one rank; more ranks train on more samples a step


class Averaging(torch.optim.SGD):
    """In place of ``hvd.DistributedOptimizer`` where there is no Horovod."""

    def step(self) -> None:
        """Average the gradients over all ranks, then take a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
                parameter.grad /= MPI.COMM_WORLD.size
        super().step()


def make_data() -> TensorDataset:
    """Make samples of eight numbers, and two classes that a network can tell apart."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 8, generator=generator)
    return TensorDataset(inputs, (inputs.pow(2).sum(1) > 8).long())


def make_training(size: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Make the model and an optimizer that averages over the ranks."""
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
    )
    options = {"lr": RATE * size, "momentum": 0.9}
    if hvd is None:
        return model, Averaging(model.parameters(), **options)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    return model, hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters()
    )


def main() -> None:
    """Train, and go on where the last run was cut off."""
    args = parse_arguments()
    torch.set_num_threads(1)  # sums in one order: the same bits each time
    if hvd is not None:
        hvd.init()
    size = MPI.COMM_WORLD.size if hvd is None else hvd.size()
    rank = MPI.COMM_WORLD.rank if hvd is None else hvd.rank()
    torch.manual_seed(rank)  # run() makes the ranks equal

    # Each batch is committed to memory, every so many of them to disk, behind the training.
    options = Options(interval=args.interval, asynchronous=True, sync=False)
    configure(args.checkpoints, options=options)
    data = make_data()
    sampler = ElasticSampler(data)
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    model, optimizer = make_training(size)
    state = TorchState(model, optimizer, epoch=0, batch=0, losses=[], sampler=sampler)

    def rescale() -> None:
        for group in optimizer.param_groups:
            group["lr"] = RATE * sampler.num_replicas

    state.register_reset_callbacks([rescale])
    log = Log(args.log if rank == 0 else None)

    @run
    def train(state: TorchState) -> None:
        rescale()  # another number of ranks may have committed
        log.write("start", ranks=sampler.num_replicas, epoch=state.epoch, batch=state.batch)
        while state.epoch < args.epochs:
            for number, (inputs, labels) in enumerate(loader):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                sampler.record_batch(number, len(inputs))
                state.losses.append(loss.item())
                state.batch += 1
                time.sleep(args.pause)
                state.commit()  # leaves here, with all saved, when asked to stop
                log.write("commit", epoch=state.epoch, batch=state.batch)
            state.epoch += 1
            sampler.set_epoch(state.epoch)

    train(state)
    log.write("end", batch=state.batch, losses=len(state.losses), digest=digest(model))
    if rank == 0:
        print(f"weights {digest(model)[:16]} after {state.batch} batches")
    if hvd is not None:
        hvd.shutdown()


class Log:
    """Events as JSON lines, for whoever wants to watch."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, event: str, **values: object) -> None:
        """Add a line."""
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"event": event, **values}) + "\n")


def digest(model: torch.nn.Module) -> str:
    """Return a fingerprint of the weights."""
    whole = hashlib.sha256()
    for parameter in model.parameters():
        whole.update(parameter.detach().numpy().tobytes())
    return whole.hexdigest()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--interval", type=int, default=10, help="commits between saves")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds a batch waits")
    parser.add_argument("--log", type=Path, help="file for events, as JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
