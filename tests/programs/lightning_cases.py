# SPDX-License-Identifier: Apache-2.0
"""Short trainings with Lightning, cut off where it hurts; notes what came of each.

With one directory as its argument, in which each case has one of its own.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from mpi4py import MPI
from torch.utils.data import DataLoader, TensorDataset

from mpi_ckpt import ObjectState, Options
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.integrations.lightning import ElasticLoader, MPICheckpoint, MPICheckpointIO

COMM = MPI.COMM_WORLD
ROOT = Path(sys.argv[1])
DATA = TensorDataset(torch.linspace(0, 1, 80).reshape(20, 4), torch.arange(20.0))
RESULTS = {}
WHOLE = []  # the uninterrupted training


class CutOff(Exception):
    """The power fails, as far as the case is concerned."""


class Model(pl.LightningModule):
    def __init__(self, hidden=3, **hyper):
        super().__init__()
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, hidden), torch.nn.Dropout(0.4), torch.nn.Linear(hidden, 1)
        )
        self.seen = []

    def training_step(self, batch, index):
        inputs, targets = batch
        self.seen.append([self.trainer.current_epoch, *map(int, targets)])
        return (self.layers(inputs)[:, 0] - targets).square().mean()

    def validation_step(self, batch, index):
        self.log("error", self.layers(batch[0]).abs().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        plan = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return [optimizer], [plan]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = {"batches": len(self.seen), "tuple": (1, 2)}

    def on_load_checkpoint(self, checkpoint):
        self.loaded = checkpoint["mine"]


class Cut(pl.Callback):
    """Cuts a run off after so many batches, at the start of the next."""

    def __init__(self, after):
        self.left = after

    def on_train_batch_start(self, trainer, module, *args):
        if self.left == 0:
            raise CutOff
        self.left -= 1


class Drift(pl.Callback):
    """One replica goes astray, as on a faulty node."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if COMM.rank == 1:
            with torch.no_grad():
                module.layers[0].bias.add_(1)


def fit(name, *, after=-1, loader=None, model=None, fit=None, callbacks=(), **options):
    """Train in the directory of a case; return the module."""
    torch.manual_seed(7)
    model = Model() if model is None else model
    torch.manual_seed(11 + COMM.rank)
    loader = ElasticLoader(DATA, 4) if loader is None else loader
    checkpoints = MPICheckpoint(
        ROOT / name,
        loader=loader if isinstance(loader, ElasticLoader) else None,
        states=[ObjectState("extra", [1])],
        options=Options(interval=1, abort_on_error=False),
    )
    settings = {
        "max_epochs": 2, "accelerator": "cpu", "strategy": "ddp", "devices": COMM.size,
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [checkpoints, Cut(after), *callbacks],
    }  # fmt: skip
    trainer = pl.Trainer(**{**settings, **options})
    trainer.fit(model, loader, DataLoader(DATA, batch_size=10), **(fit or {}))
    return model


def weights(model):
    return [value.tolist() for value in model.state_dict().values()]


def cut_off(name, after, **options):
    """Cut a training off, go on with it; return both modules."""
    try:
        fit(name, after=after, **options)
    except CutOff:
        pass
    else:
        raise AssertionError("it was not cut off")
    return fit(name, **options)


def refusal(work):
    try:
        work()
    except CheckpointError as error:
        return [type(error).__name__, str(error)]
    return None


def case_resumed():
    """At each place of an epoch: its middle, its last batch, the first of the next."""
    whole = fit("whole")
    WHOLE.append(whole)
    outcomes = {}
    for after in (3, 5, 7):
        again = cut_off(f"cut-{after}", after)
        equal = weights(again) == weights(whole)
        outcomes[after] = [equal, again.seen == whole.seen[after:], again.loaded]
    return outcomes


def case_drift():
    """Replicas that differ at a save are made equal: here after each batch."""
    return weights(fit("drift", max_epochs=1, callbacks=[Drift(), pl.callbacks.Timer()]))


def case_accumulate():
    """No save falls between batches whose gradients add up."""
    whole = fit("accumulate-whole", accumulate_grad_batches=2)
    again = cut_off("accumulate", 3, accumulate_grad_batches=2)
    return [weights(again) == weights(whole), again.seen == whole.seen[2:]]


def case_workers():
    """A loader with workers asks for batches ahead of the training."""

    with contextlib.suppress(CutOff):
        fit("workers", after=5, loader=ElasticLoader(DATA, 4, num_workers=1))
    again = fit("workers", loader=ElasticLoader(DATA, 4, num_workers=1))
    return [weights(again) == weights(WHOLE[0]), again.seen == WHOLE[0].seen[5:]]


def case_wins_over_path():
    """A first start takes ckpt_path; whatever was saved since comes first."""
    path = ROOT / "pretrained.ckpt"
    model = fit("pretrained", max_epochs=1)
    model.trainer.save_checkpoint(path)
    how = {"ckpt_path": path}
    whole, again = fit("path-whole", fit=how), cut_off("path", 2, fit=how)
    return [len(whole.seen), weights(again) == weights(whole), again.seen == whole.seen[2:]]


def case_hyper_parameter():
    return refusal(lambda: fit("hyper", model=Model(of=torch.nn.ReLU())))


def case_other_model():
    fit("model", max_epochs=1)
    return refusal(lambda: fit("model", model=Model(hidden=5), max_epochs=1))


def case_other_batch_size():
    with contextlib.suppress(CutOff):
        fit("batch-size", after=2)
    return refusal(lambda: fit("batch-size", loader=ElasticLoader(DATA, 5)))


def case_devices():
    return refusal(lambda: fit("devices", devices=COMM.size + 1))


def case_plugin():
    """Lightning's own checkpoints, written and read by ours."""
    path = ROOT / "plugin"

    def run(limit, **how):
        torch.manual_seed(7)
        model = Model()
        torch.manual_seed(11 + COMM.rank)
        saver = pl.callbacks.ModelCheckpoint(path, save_last=True, save_top_k=1)
        trainer = pl.Trainer(
            max_epochs=limit, accelerator="cpu", strategy="ddp", devices=COMM.size,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[saver], plugins=[MPICheckpointIO()],
        )  # fmt: skip
        trainer.fit(model, DataLoader(DATA, batch_size=2), **how)
        return model

    run(1)
    names = sorted(entry.name for entry in path.iterdir())
    model = run(2, ckpt_path="last")
    after = sorted(entry.name for entry in path.iterdir())
    return [names, after, model.loaded, len(model.seen)]


def main():
    warnings.simplefilter("ignore")
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            RESULTS[name.removeprefix("case_")] = case()
            COMM.Barrier()
    everyone = COMM.gather(RESULTS)
    if COMM.rank == 0:
        (ROOT / "results.json").write_text(json.dumps(everyone))


main()
