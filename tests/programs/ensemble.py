# SPDX-License-Identifier: Apache-2.0
"""Members of two ranks: ensemble.py FOLDER HOW [STEPS]

Member 0's second rank fails in its third step in the way that HOW says; its first rank
waits for it in an allreduce of its own, or in a save.
"""

import logging
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ckpt import ArrayState, CheckpointManager, Options
from mpi_ckpt.engine import abort

logging.basicConfig(format="%(levelname)s %(message)s")
folder, how, *rest = sys.argv[1:]
steps = int(rest[0]) if rest else 6
abort._ERROR_SECONDS = abort._EXIT_SECONDS = 0.5
world = MPI.COMM_WORLD
member = world.rank // 2
ours = world.Split(member, world.rank)
array = np.zeros(4)


def fails(step: int) -> bool:
    if how == "late" and member == 0 and step == 2:
        time.sleep(6)  # the other member is done by now, and waits no longer to be asked
    failing = {"both": (0, 1), "agreed": (), "none": ()}.get(how, (0,))
    return member in failing and ours.rank == 1 and step == 2


def train(manager: CheckpointManager) -> None:
    for step in range(steps):
        if how == "agreed" and member == 0 and step == 2:
            raise ValueError("no luck")
        if fails(step):
            if how == "exit":
                sys.exit(7)
            raise ValueError(f"no luck in member {member}")
        array[:] = step
        if how != "save" or member:
            ours.allreduce(step)
            time.sleep(0.2 if member and how != "late" else 0.05)
        manager.save(step)


options = Options(
    abort_on_error="communicator", deadline_seconds=3 if how == "late" else 60
)
root = Path(folder, f"member-{member}")
states = [ArrayState("a", {"x": array})]
with CheckpointManager(root, states, comm=ours, options=options) as manager:
    train(manager)
print(f"member {member} rank {ours.rank} is done", flush=True)
