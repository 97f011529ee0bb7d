# SPDX-License-Identifier: Apache-2.0
"""One rank does not come: hanging.py FOLDER HOW RANK DEADLINE

The rank stops itself, reads a FIFO that nobody writes, computes without end, or hangs in
an fsync, or dies while it says that it is busy; the others wait for it in a save.
"""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ckpt import ArrayState, CheckpointManager, Options, State
from mpi_ckpt.comm import liveness
from mpi_ckpt.engine import abort
from mpi_ckpt.storage import filesystem
from tests.launch import launchers_of

logging.basicConfig(format="%(levelname)s %(message)s")
folder, how, rank, deadline = sys.argv[1:]
absent = MPI.COMM_WORLD.rank == int(rank)
liveness._ROLL_CALL_SECONDS = 1.0
# A disk that takes seconds for it would be a rank that hangs, at another place.
os.fsync = lambda descriptor: None
abort._ERROR_SECONDS = 0.5


class Pipe(State):
    """A state whose sync reads what nobody writes."""

    def sync(self) -> None:
        if absent and how == "fifo":
            Path(folder, "fifo").read_bytes()


def hang(descriptor: int) -> None:
    threading.Event().wait()


def stay_away() -> None:
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while how == "compute":
        pass
    if how == "busy":
        with manager.busy("writing VTK"):
            die_unseen()


def die_unseen() -> None:
    """Die while the launcher, which would end the job, has no turn."""
    launcher = launchers_of(os.getppid())
    for process in launcher:
        os.kill(process, signal.SIGSTOP)
    if os.fork() == 0:
        time.sleep(2.5 * float(deadline))
        for process in reversed(launcher):
            os.kill(process, signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


options = Options(deadline_seconds=float(deadline), asynchronous=how == "behind")
# Nor are the ranks to wait for one that is slow to start.
MPI.COMM_WORLD.Barrier()
states = [ArrayState("a", {"x": np.zeros(5)}), Pipe("pipe")]
with CheckpointManager(Path(folder, "root"), states, options=options) as manager:
    manager.save().wait() if how == "behind" else manager.save()
    if absent:
        if how in ("fsync", "behind"):
            filesystem.sync_file = hang
        stay_away()
    manager.save()
    manager.wait()
