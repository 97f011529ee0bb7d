# SPDX-License-Identifier: Apache-2.0
"""Saves twice; at the second time a state's sync() raises on rank 1, and nobody catches."""

import sys
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt import CheckpointManager, State


class Moody(State):
    """A state of which one rank's sync fails when told to."""

    fails = False

    def sync(self) -> None:
        if self.fails:
            raise ValueError("no luck today")


state = Moody("moody")
with CheckpointManager(Path(sys.argv[1]), [state]) as manager:
    manager.save()
    state.fails = MPI.COMM_WORLD.rank == 1
    manager.save()
print("not reached")
