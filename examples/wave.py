# SPDX-License-Identifier: Apache-2.0
"""Lets a wave run along a string; each rank has some points of it.

::

    mpirun -n 3 python examples/wave.py
"""

import sys

import numpy as np
from mpi4py import MPI

from mpi_ckpt import Block, CheckpointManager, ObjectState, Options, ShardedArrayState

POINTS, STEPS, DT = 3000, 2000, 0.5
comm = MPI.COMM_WORLD
first, end = (POINTS * rank // comm.size for rank in (comm.rank, comm.rank + 1))

# This rank's points, and one of each neighbour: the ghosts.
place = np.arange(first - 1, end + 1) / POINTS
now = np.exp(-((place - 0.3) ** 2) * 1000)
before = now.copy()
clock = ObjectState("clock", {"time": 0.0})


def advance() -> None:
    """Move the wave by one step of time."""
    left = comm.rank - 1 if comm.rank > 0 else MPI.PROC_NULL
    right = comm.rank + 1 if comm.rank < comm.size - 1 else MPI.PROC_NULL
    comm.Sendrecv(now[1:2], dest=left, recvbuf=now[-1:], source=right)
    comm.Sendrecv(now[-2:-1], dest=right, recvbuf=now[:1], source=left)
    bend = now[:-2] - 2 * now[1:-1] + now[2:]
    after = 2 * now[1:-1] - before[1:-1] + DT**2 * bend
    before[:] = now
    now[1:-1] = after
    clock.value["time"] += DT


def main() -> None:
    """Compute, and go on where the last run was cut off."""
    fields = {
        name: Block.rows(array, comm, ghosts=((1, 1),))
        for name, array in (("now", now), ("before", before))
    }
    states = [ShardedArrayState("wave", fields), clock]
    with CheckpointManager("wave", states, options=Options(interval=100)) as manager:
        manager.restore()
        while manager.steps < STEPS:
            advance()
            if manager.step():
                sys.exit(manager.exit_code)
        manager.save()
    energy = comm.allreduce(float(((now - before)[1:-1] ** 2).sum()))
    if comm.rank == 0:
        print(f"time {clock.value['time']:.1f}  energy {energy:.9f}")


main()
