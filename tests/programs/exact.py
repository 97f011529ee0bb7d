# SPDX-License-Identifier: Apache-2.0
"""A training in whole numbers, equal for any ranks: exact.py FOLDER STEPS PACE [LOCAL]

With LOCAL, a path of each host's own, it saves there at each step, and to FOLDER only at a
stop and at the end. Root notes step, ranks and source of each start in FOLDER/starts, logs
a line a step to FOLDER/curve.jsonl, and the weights at the end to FOLDER/weights.json.
`train_alone` is the same without MPI.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

BATCH = 12
WIDTH = 64
PRIME = 2**31 - 1


def gradient(step, weights, samples):
    """Sum over samples what each says of the weights: exact, so in any order."""
    total = np.zeros(WIDTH, np.int64)
    for sample in samples:
        seed = (step * BATCH + sample) * 7919 % PRIME
        total += (weights * (seed % 1009 + 1) + seed) % PRIME
    return total


def move(weights, total):
    weights[:] = (weights + total) % PRIME
    return int(weights.sum() % PRIME)


def train_alone(steps):
    """Return loss after each step, and the weights."""
    weights = np.arange(WIDTH, dtype=np.int64)
    losses = [move(weights, gradient(s, weights, range(BATCH))) for s in range(steps)]
    return losses, weights.tolist()


def main():
    from mpi4py import MPI

    from mpi_ckpt import ArrayState, CheckpointManager, KeepLast, Local, Options

    folder, steps, pace = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    world = MPI.COMM_WORLD
    weights = np.arange(WIDTH, dtype=np.int64)
    states = [ArrayState("weights", {"w": weights})]
    local = Local(sys.argv[4], every=1, copies=2, reserve=0) if sys.argv[4:] else None
    options = Options(interval=None if local else 5, retention=KeepLast(3))
    with CheckpointManager(
        folder / "checkpoints", states, options=options, local=local
    ) as manager:
        restored = manager.restore()
        level = "nothing" if restored is None else restored.level
        if world.rank == 0:
            with (folder / "starts").open("a") as file:
                file.write(f"{manager.steps} {world.size} {level}\n")
        while manager.steps < steps:
            mine = gradient(manager.steps, weights, range(world.rank, BATCH, world.size))
            total = np.empty_like(mine)
            world.Allreduce(mine, total)
            loss = move(weights, total)
            if world.rank == 0:
                line = {"step": manager.steps, "loss": loss, "size": world.size}
                with (folder / "curve.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
            time.sleep(pace)
            if manager.step():
                sys.exit(manager.exit_code)
        manager.save()
        if world.rank == 0:
            done = folder / f"weights.{os.getpid()}"
            done.write_text(json.dumps(weights.tolist()))
            done.rename(folder / "weights.json")


if __name__ == "__main__":
    main()
