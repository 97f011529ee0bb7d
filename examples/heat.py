# SPDX-License-Identifier: Apache-2.0
"""Computes how heat spreads over a plate; each rank has some rows of it.

::

    mpirun -n 3 python examples/heat.py
    python examples/heat.py              # one process works as well

Kill it at any moment, start it again with any number of ranks: it goes on, and ends with
the same temperatures, bit for bit, as if it had never stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ckpt import Block, CheckpointManager, Options, ShardedArrayState

ROWS, COLUMNS = 96, 64


def main() -> None:
    """Compute, and go on where the last run was cut off."""
    args = parse_arguments()
    comm = MPI.COMM_WORLD
    plate = hot_in_the_middle(comm.rank, comm.size)

    # Which rows of the plate this rank has; on either side one more, a neighbour's.
    rows = Block.rows(plate, comm, ghosts=((1, 1), (0, 0)))
    fields = ShardedArrayState("fields", {"temperature": rows})
    options = Options(interval=args.interval)
    with CheckpointManager(args.checkpoints, [fields], options=options) as manager:
        manager.restore()
        while manager.steps < args.steps:
            exchange_edges(plate, comm)
            spread(plate)
            if manager.step():
                sys.exit(manager.exit_code)
    write_result(plate, comm, args.result)


def hot_in_the_middle(rank: int, size: int) -> np.ndarray:
    """Return this rank's rows at the start, with one more row on either side."""
    first, end = ROWS * rank // size, ROWS * (rank + 1) // size
    row, column = np.mgrid[first - 1 : end + 1, 0:COLUMNS]
    distance = (row - ROWS / 2) ** 2 + (column - COLUMNS / 2) ** 2
    plate: np.ndarray = np.where(distance < ROWS, 100.0, 20.0)
    return plate


def exchange_edges(plate: np.ndarray, comm: MPI.Intracomm) -> None:
    """Copy the outer rows of the neighbours; the plate's own edge keeps its heat."""
    above = comm.rank - 1 if comm.rank > 0 else MPI.PROC_NULL
    below = comm.rank + 1 if comm.rank < comm.size - 1 else MPI.PROC_NULL
    comm.Sendrecv(plate[1], dest=above, recvbuf=plate[-1], source=below)
    comm.Sendrecv(plate[-2], dest=below, recvbuf=plate[0], source=above)
    if above == MPI.PROC_NULL:
        plate[0] = plate[1]
    if below == MPI.PROC_NULL:
        plate[-1] = plate[-2]


def spread(plate: np.ndarray) -> None:
    """Let heat flow for one step: each point moves towards its four neighbours."""
    inner = plate[1:-1]
    left = np.concatenate([inner[:, :1], inner[:, :-1]], axis=1)
    right = np.concatenate([inner[:, 1:], inner[:, -1:]], axis=1)
    plate[1:-1] = inner + 0.2 * (plate[:-2] + plate[2:] + left + right - 4 * inner)


def write_result(plate: np.ndarray, comm: MPI.Intracomm, path: Path | None) -> None:
    """Write the temperatures of the whole plate, on rank 0."""
    rows = comm.gather(plate[1:-1], root=0)
    if rows is not None:
        whole = np.concatenate(rows)
        print(f"mean {whole.mean():.6f}, highest {whole.max():.6f}")
        if path is not None:
            np.save(path, whole)


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("heat-checkpoints"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--interval", type=int, default=20, help="steps between saves")
    parser.add_argument("--result", type=Path, help="file for the final temperatures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
