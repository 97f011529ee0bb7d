# SPDX-License-Identifier: Apache-2.0
"""The job that `benchmarks.start` times: start_job.py FOLDER BYTES BEGAN.

Restores, takes a step and prints when each phase ended on the last rank, in seconds since
BEGAN. If there is nothing to restore, it saves.
"""

import sys
import time

_RUNS = time.time()

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from mpi_ckpt import ArrayState, CheckpointManager, Options  # noqa: E402

_ARRAYS = 150


def main(folder: Path, nbytes: int, began: float) -> None:
    """Start as a training does, up to its first step."""
    ends = {"launch": _RUNS, "import": time.time()}
    comm = MPI.COMM_WORLD
    each = nbytes // _ARRAYS // 8
    arrays = {f"a{n:03}": np.full(each, float(n)) for n in range(_ARRAYS)}
    ends["state"] = time.time()
    options = Options(preemption_signals=())
    states = [ArrayState("state", arrays)]
    with CheckpointManager(folder / "checkpoints", states, options=options) as manager:
        ends["manager"] = time.time()
        report = manager.restore()
        ends["restore"] = time.time()
        for array in arrays.values():
            array[:100] += comm.allreduce(1.0)
        manager.step()
        ends["step"] = time.time()
        if report is None:
            manager.save()
    latest = {name: comm.reduce(end - began, MPI.MAX) for name, end in ends.items()}
    if comm.rank == 0:
        sys.stdout.write(json.dumps(latest))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
