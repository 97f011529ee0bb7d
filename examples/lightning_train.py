# SPDX-License-Identifier: Apache-2.0
"""Trains with PyTorch Lightning, which mpirun starts and mpi_ckpt saves.

::

    mpirun -n 2 python examples/lightning_train.py

Kill it at any moment, start it again with any number of ranks: it goes on, in mid-epoch
too. What mpi_ckpt adds to a plain script are the loader and the callback.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from digits import Log, digest, load_data, make_model
from mpi4py import MPI

from mpi_ckpt import KeepLast, Options
from mpi_ckpt.integrations.lightning import ElasticLoader, MPICheckpoint

GLOBAL_BATCH = 64  # over all ranks, so any number of them takes the same steps


class Digits(pl.LightningModule):
    """The network of the other examples."""

    def __init__(self, rate: float = 2e-3) -> None:
        super().__init__()
        self.rate = rate
        self.save_hyperparameters()
        self.model = make_model()

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        """Note the accuracy."""
        images, labels = batch
        right = (self.model(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        """Make the optimizer and its schedule."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rate)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]


class Events(pl.Callback):
    """Writes down what happens, for the tests."""

    def __init__(self, log: Log) -> None:
        self.events = log

    def on_train_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        """Note where the run starts."""
        self.events.write("start", ranks=trainer.world_size, step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, _: pl.LightningModule, outputs: dict, *__: object
    ) -> None:
        """Note a step."""
        loss = outputs["loss"].item()
        epoch = trainer.current_epoch
        self.events.write("step", step=trainer.global_step, epoch=epoch, loss=loss)


def main() -> None:
    """Train, and go on where the last run was cut off."""
    args = parse_arguments()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)  # sums in one order: the same bits each time
    training, testing = load_data(comm)

    torch.manual_seed(args.seed)
    module = Digits()
    torch.manual_seed(args.seed + 1 + comm.rank)  # dropout of its own on each rank
    log = Log(args.log if comm.rank == 0 else None)

    loader = ElasticLoader(training, GLOBAL_BATCH, seed=args.seed)
    checkpoints = MPICheckpoint(
        args.checkpoints,
        loader=loader,
        options=Options(interval=args.interval, retention=KeepLast(3)),
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        strategy="ddp",
        devices=comm.size,  # on each host; num_nodes= for more hosts
        callbacks=[checkpoints, Events(log)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, torch.utils.data.DataLoader(testing, batch_size=64))
    log.write("end", step=trainer.global_step, digest=digest(module.model))
    if comm.rank == 0:
        accuracy = trainer.callback_metrics.get("accuracy", torch.nan)
        print(f"accuracy {accuracy:.4f} after {trainer.global_step} steps")


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
