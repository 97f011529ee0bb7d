# SPDX-License-Identifier: Apache-2.0
"""Count how often the ranks wait for one another in a save and in a restore.

mpirun -n 2 python -m tests.programs.meetings
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from unittest import mock

import torch
from mpi4py import MPI

from mpi_ckpt import CheckpointManager, ElasticSampler, Options, RNGState, TrainState
from mpi_ckpt.comm import Communicator

MOST = {"save": 7, "restore": 10, "frames": 11}
"""What a save and a restore may take; CONTRIBUTING.md says why."""


@contextlib.contextmanager
def counted_meetings():
    """Note what the ranks wait for one another for, within the block."""
    meetings = []
    wait = Communicator.wait

    def note(self, requests, doing, **options):
        meetings.append(doing)
        return wait(self, requests, doing, **options)

    with mock.patch.object(Communicator, "wait", note):
        yield meetings


@contextlib.contextmanager
def counted_frames():
    """Note the calls from a manager's save down to each fsync, both counted."""
    stacks = []
    fsync = os.fsync

    def note(descriptor):
        names, frame = ["fsync"], sys._getframe(1)
        while frame is not None:
            names.append(frame.f_code.co_name)
            if frame.f_code is CheckpointManager.save.__code__:
                stacks.append(names[::-1])
            frame = frame.f_back
        fsync(descriptor)

    with mock.patch.object(os, "fsync", note):
        yield stacks


def count(comm, root):
    """Return what a save and a restore of equal replicas meet for, and the deepest fsync.

    Collective.
    """
    options = Options(preemption_signals=())
    states = training_states()
    with CheckpointManager(root, states, comm=comm, options=options) as manager:
        with counted_meetings() as saving, counted_frames() as stacks:
            manager.save()
        with counted_meetings() as restoring:
            manager.restore()
    return saving, restoring, max(stacks, key=len, default=[])


def training_states():
    """Return the states of a training: model, optimizer, random streams, a sampler."""
    model = torch.nn.Linear(100, 100)
    with torch.no_grad():
        model.weight.fill_(0.1)
        model.bias.fill_(0.2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    sampler = ElasticSampler(1000, 10, seed=1)
    return [TrainState(module=model, optimizer=optimizer), RNGState(), sampler]


def main():
    comm = MPI.COMM_WORLD
    with tempfile.TemporaryDirectory() as root:
        saving, restoring, stack = count(comm, comm.bcast(root))
        comm.barrier()
    if comm.rank > 0:
        return
    for what, found, most in (
        ("meetings of a save", saving, MOST["save"]),
        ("frames of a save, down to fsync", stack, MOST["frames"]),
        ("meetings of a restore", restoring, MOST["restore"]),
    ):
        print(f"{what}: {len(found)}, at most {most}", *found, sep="\n    ")


if __name__ == "__main__":
    main()
