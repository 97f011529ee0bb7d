# SPDX-License-Identifier: Apache-2.0
"""Moves particles through a box; each rank has those in its own slice of the box.

::

    mpirun -n 3 python examples/particles.py
    python examples/particles.py         # one process works as well

Kill it at any moment, start it again with any number of ranks: it goes on, with every
particle where it was, and ends with the same positions, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ckpt import CheckpointManager, ConcatState, Options

Columns = dict[str, np.ndarray]
Home = Callable[[Columns], np.ndarray]


def main() -> None:
    """Move the particles, and go on where the last run was cut off."""
    args = parse_arguments()
    comm = MPI.COMM_WORLD

    def home(columns: Columns) -> np.ndarray:
        """Return the rank whose slice of the box each particle is in."""
        slices = (columns["position"][:, 0] * comm.size).astype(np.int64)
        return np.minimum(slices, comm.size - 1)

    # The particles of this rank: any number, another one at each save. A restore brings
    # each to the rank whose slice it is in.
    particles = ConcatState("particles", scattered(args.particles, comm, home), route=home)
    options = Options(interval=args.interval)
    with CheckpointManager(args.checkpoints, [particles], options=options) as manager:
        manager.restore()
        while manager.steps < args.steps:
            move(particles.arrays)
            particles.arrays = sent_home(particles.arrays, comm, home)
            if manager.step():
                sys.exit(manager.exit_code)
    write_result(particles.arrays, comm, args.result)


def scattered(count: int, comm: MPI.Intracomm, home: Home) -> Columns:
    """Return the particles at the start: the same ones for any number of ranks."""
    drawn = np.random.default_rng(1)
    everything = {
        "number": np.arange(count),
        "position": drawn.random((count, 2)),
        "velocity": drawn.normal(scale=0.01, size=(count, 2)),
    }
    here = home(everything) == comm.rank
    return {name: column[here] for name, column in everything.items()}


def move(columns: Columns) -> None:
    """Move each particle for one step; it bounces off the walls."""
    position, velocity = columns["position"], columns["velocity"]
    position += velocity
    outside = (position < 0) | (position > 1)
    velocity[outside] *= -1
    np.clip(position, 0, 1, out=position)


def sent_home(columns: Columns, comm: MPI.Intracomm, home: Home) -> Columns:
    """Send each particle to the rank whose slice of the box it has moved into."""
    ranks = home(columns)
    leaving = [
        {name: column[ranks == rank] for name, column in columns.items()}
        for rank in range(comm.size)
    ]
    arriving = comm.alltoall(leaving)
    return {name: np.concatenate([one[name] for one in arriving]) for name in columns}


def write_result(columns: Columns, comm: MPI.Intracomm, path: Path | None) -> None:
    """Write where all particles are, by their numbers, on rank 0."""
    parts = comm.gather(columns, root=0)
    if parts is not None:
        number = np.concatenate([one["number"] for one in parts])
        position = np.concatenate([one["position"] for one in parts])[np.argsort(number)]
        print(f"{len(number)} particles, mean position {position.mean(axis=0).round(6)}")
        if path is not None:
            np.save(path, position)


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("particles-checkpoints"))
    parser.add_argument("--particles", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--interval", type=int, default=20, help="steps between saves")
    parser.add_argument("--result", type=Path, help="file for the final positions")
    return parser.parse_args()


if __name__ == "__main__":
    main()
