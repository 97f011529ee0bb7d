# SPDX-License-Identifier: Apache-2.0
"""Runs blocks of the documents that need a framework on several ranks, each as it stands.

With a directory for what they save, and the name of a group of them.
"""

from __future__ import annotations

import functools
import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from mpi4py import MPI

import mpi_ckpt
from tests.project.pages import blocks_of, shows, take

COMM = MPI.COMM_WORLD


def run(page, number, **given):
    """Run a block where its names are given; return all its names."""
    return execute(take(page, number), **given)


def execute(text, **given):
    found = {"__name__": "shown", **given}
    exec(compile(text, "page", "exec"), found)
    return found


def training():
    """Return a model, other weights on each rank, and an optimizer."""
    torch.manual_seed(COMM.rank)
    model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def take_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.full((2, 4), 1.0 + COMM.rank)).square().mean().backward()
    for parameter in model.parameters():
        COMM.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
    optimizer.step()


def weights_of(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def assert_equal_replicas(model):
    mine = weights_of(model)
    everyone = COMM.allgather(mine)
    assert all(np.array_equal(mine, other) for other in everyone)


def horovod():
    """Put a stand-in for Horovod where its import finds it; return it."""
    from tests.horovod_stand_in import WholeHorovod

    hvd = WholeHorovod()
    sys.modules |= {"horovod": SimpleNamespace(torch=hvd), "horovod.torch": hvd}
    return hvd


@shows("docs/horovod.md", 0)
def five_lines_for_horovod_elastic():
    trained = []
    model, optimizer = training()

    def train_epoch(state):
        for batch in state.sampler:
            trained.append(batch)
            take_step(model, optimizer)
        state.commit()

    given = {"model": model, "optimizer": optimizer, "dataset": range(6)}
    state = run("docs/horovod.md", 0, **given, train_epoch=train_epoch)["state"]
    assert (state.epoch, len(trained)) == (10, 10 * -(-6 // COMM.size))
    assert_equal_replicas(model)
    # The same command once more: all is done.
    trained.clear()
    model, optimizer = given["model"], given["optimizer"] = training()
    run("docs/horovod.md", 0, **given, train_epoch=train_epoch)
    assert trained == []
    assert_equal_replicas(model)


@shows("docs/horovod.md", 1)
def broadcasts_of_horovod():
    model, optimizer = training()
    given = {"model": model, "optimizer": optimizer, "settings": {"rank": COMM.rank}}
    assert run("docs/horovod.md", 1, **given)["settings"] == {"rank": 0}
    assert_equal_replicas(model)


@shows("docs/tutorials/horovod-elastic.md", 0)
def first_block_of_the_elastic_tutorial():
    for steps in (100, 0):  # then there is nothing left to do
        done = []
        model, optimizer = training()

        def step(batch, done=done, model=model, optimizer=optimizer):
            done.append(batch)
            take_step(model, optimizer)

        page = "docs/tutorials/horovod-elastic.md"
        run(page, 0, model=model, optimizer=optimizer, step=step)
        assert len(done) == steps
        assert_equal_replicas(model)


@shows("docs/tutorials/horovod.md", 0, 1)
def scripts_for_plain_horovod():
    plain = run("docs/tutorials/horovod.md", 0)
    saved = run("docs/tutorials/horovod.md", 1)
    again = run("docs/tutorials/horovod.md", 1)  # all epochs are done
    for one in (plain, saved, again):
        assert_equal_replicas(one["model"])
    for one, other in ((plain, saved), (saved, again)):
        weights = zip(one["model"].parameters(), other["model"].parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in weights)


@shows("docs/recovery.md", 0)
def recovery_without_a_restart():
    model, optimizer = training()
    own = weights_of(model)
    found = run(
        "docs/recovery.md",
        0,
        make_model=lambda: model,
        optimizer=optimizer,
        sampler=mpi_ckpt.ElasticSampler(8, 4),
        evaluate=weights_of,
    )
    # The last rank, a spare that nobody needed, has left the program in the block.
    assert COMM.rank < COMM.size - 1
    assert np.array_equal(found["result"], own) == (COMM.rank == 0)


@shows("docs/tutorials/torch.md", 0)
def program_before_the_torch_tutorial():
    assert_equal_replicas(run("docs/tutorials/torch.md", 0)["model"])


@shows("docs/tutorials/torch.md", 2, 3)
def own_values_of_the_torch_tutorial():
    page = "docs/tutorials/torch.md"
    (program,) = (b.text for b in blocks_of(page) if b.listing == "examples/saved_torch.py")
    imports_and_states, rest = take(page, 2), take(page, 3)
    in_batch, epoch_end = rest.split("        with ", 1)
    deeper = " " * 4  # a with block is around the loop
    edits = {
        "\ncomm = ": f"\n{imports_and_states}\ncomm = ",
        "states = [training, sampler, RNGState()]": (
            "states = [training, sampler, RNGState(), best, sums]"
        ),
        "                sampler.record_batch()\n": (
            textwrap.indent(in_batch, deeper) + "                sampler.record_batch()\n"
        ),
        "            sampler.set_epoch(epoch + 1)\n            manager.save()\n": (
            textwrap.indent("        with " + epoch_end, deeper)
        ),
        "range(sampler.epoch, 10)": "range(sampler.epoch, 2)",
    }
    for old, new in edits.items():
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    best = execute(program)["best"].value
    assert 0 < best < 1
    assert COMM.allgather(best) == [best] * COMM.size
    assert execute(program)["best"].value == best  # restored, with no epoch left


@shows("docs/integrations.md", 0)
def beside_torch_distributed():
    from torch.nn.parallel import DistributedDataParallel

    model, optimizer = training()
    given = {name: getattr(mpi_ckpt, name) for name in mpi_ckpt.__all__}
    given |= {"model": model, "optimizer": optimizer}
    given |= {"DistributedDataParallel": DistributedDataParallel}
    given |= {"sampler": mpi_ckpt.ElasticSampler(8, 4)}
    run("docs/integrations.md", 0, **given)
    assert_equal_replicas(model)
    torch.distributed.destroy_process_group()


@shows("docs/distributed.md", 4)
def parameters_that_are_cut():
    import torch.distributed.fsdp as fsdp

    from mpi_ckpt.integrations.torch_distributed import communicator, init_process_group

    model, optimizer = training()
    given = {"model": model, "optimizer": optimizer, "fully_shard": fsdp.fully_shard}
    given |= {"communicator": communicator, "init_process_group": init_process_group}
    given |= {name: getattr(mpi_ckpt, name) for name in mpi_ckpt.__all__}
    run("docs/distributed.md", 4, **given)
    assert isinstance(next(model.parameters()), torch.distributed.tensor.DTensor)
    torch.distributed.destroy_process_group()


def lightning():
    """Return what the blocks take of Lightning, and the data."""
    import lightning.pytorch as pl

    class Line(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, _):
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = functools.partial(
        pl.Trainer,
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    dataset = torch.utils.data.TensorDataset(torch.randn(512, 4))
    return trainer, Line(), dataset


@shows("docs/integrations.md", 1)
@shows("docs/tutorials/lightning.md", 0)
def loader_and_callback_for_lightning():
    trainer, module, dataset = lightning()
    given = {"dataset": dataset, "Trainer": trainer, "module": module}
    given |= {"Options": mpi_ckpt.Options, "RANKS_PER_HOST": COMM.size, "HOSTS": 1}
    found = run("docs/integrations.md", 1, **given)
    assert found["trainer"].global_step == 2 * 2  # two batches of 256 an epoch
    found = run("docs/tutorials/lightning.md", 0, dataset=dataset)
    fit = trainer(strategy="ddp", devices=COMM.size, callbacks=[found["checkpoints"]])
    fit.fit(module, found["loader"])
    assert fit.global_step == 2 * 8  # of 64
    assert_equal_replicas(module)


@shows("docs/integrations.md", 2)
def durable_files_of_lightning():
    from lightning.pytorch.callbacks import ModelCheckpoint

    from mpi_ckpt.integrations.lightning import MPICheckpointIO

    trainer, module, dataset = lightning()
    made = []

    def make(**given):
        made.append(trainer(strategy="ddp", devices=COMM.size, **given))

    given = {"MPICheckpointIO": MPICheckpointIO, "ModelCheckpoint": ModelCheckpoint}
    run("docs/integrations.md", 2, Trainer=make, **given)
    made[0].fit(module, torch.utils.data.DataLoader(dataset, 64))
    if COMM.rank == 0:
        (last,) = Path("checkpoints").glob("last.ckpt")
        assert "layer.weight" in MPICheckpointIO().load_checkpoint(last)["state_dict"]


GROUPS = {
    "recovery": [recovery_without_a_restart],
    "plain": [
        program_before_the_torch_tutorial,
        own_values_of_the_torch_tutorial,
    ],
    "horovod": [
        horovod,
        five_lines_for_horovod_elastic,
        broadcasts_of_horovod,
        first_block_of_the_elastic_tutorial,
        scripts_for_plain_horovod,
    ],
    "torch": [beside_torch_distributed, parameters_that_are_cut],
    "lightning": [loader_and_callback_for_lightning, durable_files_of_lightning],
}


def main():
    torch.set_num_threads(1)
    for scene in GROUPS[sys.argv[2]]:
        folder = Path(sys.argv[1]) / scene.__name__
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        COMM.Barrier()
        scene()


if __name__ == "__main__":
    main()
