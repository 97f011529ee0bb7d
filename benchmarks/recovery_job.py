# SPDX-License-Identifier: Apache-2.0
"""The job that `benchmarks.recovery` kills a rank of: recovery_job.py FOLDER BYTES HOW.

Writes when it saw the loss, and when it took its first step after it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ckpt import ArrayState, CheckpointManager, elastic

ARRAYS = 48
SAVE_AT, DIE_AT, END_AT = 3, 6, 8


def main(folder: Path, nbytes: int, how: str) -> None:
    """Train a few steps: all but RESTARTED, which is started again, recover in place."""
    # Made once, as a model is: what is there need not be made again.
    each = nbytes // ARRAYS // 8
    arrays = {f"a{n:02}": np.full(each, float(n)) for n in range(ARRAYS)}
    died = folder / "died"

    def note(name: str) -> None:
        (folder / name).write_text(str(time.monotonic_ns()))

    def train(world: elastic.World) -> None:
        is_after = died.exists()
        states = [ArrayState("state", arrays), ArrayState("count", {"n": np.zeros(1)})]
        try:
            with CheckpointManager(
                folder / "checkpoints", states, comm=world.comm, memory=world.memory
            ) as manager:
                manager.restore()
                while manager.steps < END_AT:
                    world.comm.Allreduce(np.ones(1000), np.empty(1000))
                    is_last = world.rank == world.size - 1
                    if manager.steps == DIE_AT and is_last and not is_after:
                        note("died")
                        os.kill(os.getpid(), signal.SIGKILL)
                    for array in arrays.values():
                        array[:100] += 1
                    manager.step()
                    if manager.steps == SAVE_AT:
                        manager.save()
                    if is_after and world.rank == 0 and not (folder / "on").exists():
                        note("on")
        except Exception:
            if world.rank == 0:
                note("seen")
            raise

    if how == "restarted":
        train(elastic.World(MPI.COMM_WORLD, elastic.Memory()))
    else:
        elastic.run(train, replace=how == "replaced", spares=int(how == "spare"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
