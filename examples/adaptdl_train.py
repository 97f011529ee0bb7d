# SPDX-License-Identifier: Apache-2.0
"""A program written for adaptdl, run by mpirun: nothing but its imports was changed.

::

    MPI_CKPT_DIR=checkpoints mpirun -n 4 python examples/adaptdl_train.py

Its states write themselves, with torch.save and with pickle, as adaptdl's users do it.
What an epoch has summed up and how far it has come is kept when the job is killed, and
the next one may have another number of ranks.
"""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import BinaryIO

import torch
from mpi4py import MPI

# Before: import adaptdl.checkpoint as checkpoint
#         from adaptdl.torch import Accumulator, remaining_epochs_until
import mpi_ckpt.checkpoint as checkpoint
from mpi_ckpt.checkpoint import Accumulator, remaining_epochs_until

SAMPLES = 2400
BATCH = 24  # over all ranks: 1, 2, 3 or 4 of them share it evenly

comm = MPI.COMM_WORLD


class TrainingState(checkpoint.State):
    """Model and optimizer, as adaptdl's own data-parallel wrapper saves them."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__("training")
        self.model, self.optimizer = model, optimizer

    def save(self, fileobj: BinaryIO) -> None:
        """Write both state dicts."""
        torch.save((self.model.state_dict(), self.optimizer.state_dict()), fileobj)

    def load(self, fileobj: BinaryIO) -> None:
        """Read both state dicts."""
        model, optimizer = torch.load(fileobj)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


class ProgressState(checkpoint.State):
    """Samples of this epoch that all ranks have trained on; ranks count their own."""

    def __init__(self) -> None:
        super().__init__("progress")
        self.done = 0
        self.mine = 0

    def save(self, fileobj: BinaryIO) -> None:
        """Write the number, as a pickle."""
        pickle.dump(self.done, fileobj)

    def load(self, fileobj: BinaryIO) -> None:
        """Read the number; whoever can write there can run code here, as ever."""
        self.done = pickle.load(fileobj)  # noqa: S301

    def sync(self) -> None:
        """Add up what the ranks have counted since they last met."""
        self.done += comm.allreduce(self.mine)
        self.mine = 0


def main() -> None:
    """Fit a line through noise, and go on where the last run was cut off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--results", type=Path, help="file for each epoch's sums")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randn(SAMPLES, 8)
    targets = inputs @ torch.arange(8.0) + 0.1 * torch.randn(SAMPLES)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    training, progress = TrainingState(model, optimizer), ProgressState()
    for state in (training, progress):
        checkpoint.load_state(state)

    for epoch in remaining_epochs_until(args.epochs):
        statistics = Accumulator()
        for start in range(progress.done, SAMPLES, BATCH):
            mine = slice(start + comm.rank, start + BATCH, comm.size)
            loss = train_on(inputs[mine], targets[mine], model, optimizer)
            samples = len(inputs[mine])
            statistics["loss"] += loss * samples
            statistics["samples"] += samples
            progress.mine += samples
            if (start // BATCH + 1) % 10 == 0:
                checkpoint.save_all_states()
        with statistics.synchronized():
            average = statistics["loss"] / statistics["samples"]
            total = statistics["samples"]
        progress.done = progress.mine = 0
        if comm.rank == 0:
            print(f"epoch {epoch}  loss {average:.5f}  samples {total}", flush=True)
            if args.results:
                line = {"epoch": epoch, "loss": average, "samples": total}
                with args.results.open("a") as file:
                    print(json.dumps(line), file=file)


def train_on(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> float:
    """Take one step with the gradients averaged over all ranks."""
    loss = torch.nn.functional.mse_loss(model(inputs).squeeze(1), targets)
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        comm.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
        parameter.grad /= comm.size
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    main()
