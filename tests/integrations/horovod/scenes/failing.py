# SPDX-License-Identifier: Apache-2.0
"""Ranks that die or stand still while the others broadcast."""

from __future__ import annotations

import os
import signal
import time

import horovod.torch as hvd
import torch
from mpi4py import MPI

from mpi_ckpt.integrations import horovod as beside
from mpi_ckpt.integrations.horovod import parameters
from tests.integrations.horovod.playing import error_of

LAST = MPI.COMM_WORLD.size - 1


def _signalled_within(number):
    """Have the last rank send itself a signal between two meetings of a broadcast."""
    real = parameters.sync_states

    def sync(*arguments, **options):
        if MPI.COMM_WORLD.rank == LAST:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    parameters.sync_states = sync


def killed_within():
    hvd.init()
    _signalled_within(signal.SIGKILL)
    beside.broadcast_parameters({"w": torch.ones(1 << 20)}, deadline_seconds=30)


def stopped(when):
    """The last rank stops; the first wakes it when it has been told of it."""
    hvd.init()
    given = {"w": torch.full((8,), float(MPI.COMM_WORLD.rank))}
    pids = MPI.COMM_WORLD.allgather(os.getpid())
    if when == "within":
        _signalled_within(signal.SIGSTOP)
    elif MPI.COMM_WORLD.rank == LAST:
        os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    told = error_of(lambda: beside.broadcast_parameters(given, deadline_seconds=2))
    seconds = time.monotonic() - start
    if MPI.COMM_WORLD.rank == 0:
        os.kill(pids[LAST], signal.SIGCONT)
    # No rank gets on without the others, so that none ends the job under them.
    MPI.COMM_WORLD.allgather(None)
    untouched = given["w"].tolist() == [MPI.COMM_WORLD.rank] * 8
    return {"told": told, "seconds": seconds, "untouched": untouched}
