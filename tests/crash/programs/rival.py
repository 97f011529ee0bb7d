# SPDX-License-Identifier: Apache-2.0
"""One of two jobs that want the same directory: restores, then saves until it may not.

Arguments: a directory for everything, a name for this job, how long it waits for another
owner in seconds. In the directory: ``ckpt`` the checkpoints; ``acked`` a line for each save
that returned, of any job: generation, step, name; ``began-NAME`` the step that the job has
found; ``end-NAME-RANK`` the error that a rank has ended with; ``shared`` files of shared
memory to be removed; ``problem`` what should not be. A file ``stop`` ends it.
"""

import os
import sys
import traceback
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt import IO
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.storage.owning import lock
from tests.crash.faults import quiet
from tests.crash.programs.saver import note
from tests.crash.world import Saved, Training
from tests.launch import shared_memory

directory, name, patience = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
comm = MPI.COMM_WORLD
is_root = comm.rank == 0


def acknowledged() -> int:
    """Return the highest step that any job has acknowledged; 0 if there is none."""
    path = directory / "acked"
    lines = path.read_text().splitlines() if path.exists() else []
    return max([0, *(int(line.split()[1]) for line in lines)])


def run() -> None:
    acked = comm.bcast(acknowledged() if is_root else None)
    options = {
        "keep": 2,
        "comm": comm,
        "deadline_seconds": 60,
        "asynchronous": acked % 2 == 1,  # now and then, the same on every rank
        "overlap": acked % 4 == 3,
        "writers": "all" if acked % 5 > 2 else "root",
        "io": IO(reuse=acked % 3 > 0),
    }
    with Training(directory / "ckpt", **options) as training:
        found = training.restore()
        step = 0 if found is None else found.step
        if step < acked or found not in (None, Saved.of(step)):
            raise AssertionError(f"{found} came back, step {acked} was acknowledged")
        if is_root:
            note(directory / f"began-{name}", step)
        while not comm.bcast((directory / "stop").exists() if is_root else None):
            step += 1
            training.move(step)
            report = training.manager.save(step).wait()
            if is_root:
                note(directory / "acked", f"{report.generation} {step} {name}")


def main() -> None:
    lock.DirectoryLock.__init__.__defaults__ = (patience,)
    for path in shared_memory(os.getpid()):  # MPI's, which a killed rank cannot remove
        note(directory / "shared", path)
    try:
        with quiet():
            run()
    except CheckpointError as error:
        note(directory / f"end-{name}-{comm.rank}", f"{type(error).__name__}: {error}")
    except BaseException:
        note(directory / "problem", f"rank {comm.rank}: {traceback.format_exc()}")
        raise


if __name__ == "__main__":
    main()
