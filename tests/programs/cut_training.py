# SPDX-License-Identifier: Apache-2.0
"""Trains what torch cuts over the ranks: cut_training.py FOLDER ACTION...

``RANKS:save:KIND`` takes three steps with a kind of `tests.cut.trainings`, saves, and notes
the whole tensors then and after three more steps. ``RANKS:load:KIND:KIND-RANKS`` restores
what the last name was saved by, compares, and goes on where kind and ranks are the same.
Each action is one of so many of the job's ranks, the first ones.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from mpi4py import MPI

from mpi_ckpt import CheckpointManager, Options, TrainState
from mpi_ckpt.integrations.torch_distributed import communicator, init_process_group
from tests.cut.trainings import KINDS, Training, tensors_by_torch, whole_tensors

STEPS = 3


def main() -> None:
    folder, actions = Path(sys.argv[1]), [one.split(":", 2) for one in sys.argv[2:]]
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    for ranks, group in groupby(actions, key=lambda action: int(action[0])):
        part = world.Split(int(world.rank >= ranks), world.rank)
        if world.rank < ranks:
            init_process_group("gloo", comm=part)
            for _, action, name in group:
                {"save": save, "load": load}[action](part, folder, name)
            dist.destroy_process_group()
        part.Free()
        world.Barrier()


def save(comm: MPI.Intracomm, folder: Path, kind: str) -> None:
    home = folder / f"{kind}-{dist.get_world_size()}"
    training = KINDS[kind](seed=0)
    take_steps(training, 0)
    with manager(comm, home, training) as ours:
        ours.save(step=STEPS)
    note(home, "saved", training)
    take_steps(training, STEPS)
    note(home, "later", training)


def load(comm: MPI.Intracomm, folder: Path, name: str) -> None:
    kind, saved = name.split(":")
    goes_on = saved == f"{kind}-{dist.get_world_size()}"
    training = KINDS[kind](seed=1)
    # Its optimizer then has state, to be filled in place. DistributedDataParallel orders
    # its sums anew after the first step: that has to be over, for equal bits later.
    if sum(map(ord, name)) % 2 or (goes_on and training.model is not training.net):
        training.step(9)
    with manager(comm, folder / saved, training) as ours:
        assert ours.restore().step == STEPS
    compare(folder / saved, "saved", training)
    if goes_on:
        take_steps(training, STEPS)
        compare(folder / saved, "later", training)


def manager(comm: MPI.Intracomm, home: Path, training: Training) -> CheckpointManager:
    state = TrainState(module=training.model, optimizer=training.optimizer)
    options = Options(preemption_signals=())
    return CheckpointManager(home, [state], comm=communicator(comm=comm), options=options)


def take_steps(training: Training, first: int) -> None:
    for number in range(first, first + STEPS):
        training.step(number)


def note(home: Path, moment: str, training: Training) -> None:
    whole = whole_tensors(training)
    assert all(whole[name].equal(t) for name, t in tensors_by_torch(training).items())
    if dist.get_rank() == 0:
        torch.save(whole, home / f"{moment}.pt")
    dist.barrier()


def compare(home: Path, moment: str, training: Training) -> None:
    expected, found = torch.load(home / f"{moment}.pt"), whole_tensors(training)
    assert found.keys() == expected.keys()
    differing = [
        name
        for name, tensor in expected.items()
        if tensor.dtype != found[name].dtype or not tensor.equal(found[name])
    ]
    assert not differing, (home.name, moment, differing)


if __name__ == "__main__":
    main()
