# SPDX-License-Identifier: Apache-2.0
"""A rank stops: stopped.py FOLDER PHASE KIND NUMBER WHEN RANK DEADLINE

PHASE is ``save`` or ``restore``; in it RANK stops itself by SIGSTOP, before, inside or
after (WHEN) its NUMBERth ``change`` of the file system or part in a ``collective`` (KIND).
With ``slow`` for KIND the first fsync of that save takes NUMBER seconds instead, on root;
with ``nothing`` all goes well. In the folder: ``ckpt`` the checkpoints, ``stopped`` the
process that has stopped itself, ``error-RANK`` the CollectiveError of each rank,
``done-RANK`` the step that each has in the end.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt.comm import liveness
from mpi_ckpt.errors import CollectiveError
from mpi_ckpt.storage import filesystem
from tests.crash.moments import Changes, Collectives, Moment
from tests.crash.recorder import in_place_of_os
from tests.crash.world import Saved, Training
from tests.waiting import wait_for

logging.basicConfig(format="%(levelname)s %(message)s")
folder, phase, kind, number, when, whom, deadline = sys.argv[1:]
directory, world = Path(folder), MPI.COMM_WORLD
liveness._ROLL_CALL_SECONDS = 1.0
is_it = world.rank == int(whom)


def put(name: str, text: object) -> None:
    """Write a file that is there with all its contents or not at all."""
    made = directory / f".{name}"
    made.write_text(str(text))
    made.rename(directory / name)


def stop() -> None:
    put("stopped", os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


def slow_fsync(seconds: float) -> None:
    """Let the next fsync of a file take so long."""
    real = filesystem.sync_file

    def slow(descriptor: int) -> None:
        filesystem.sync_file = real
        time.sleep(seconds)
        real(descriptor)

    filesystem.sync_file = slow


def moment(of: str) -> Moment:
    return Moment(int(number) if kind == of and is_it else 0, when)


def run(training: Training, collectives: Collectives) -> None:
    """Save, and save or restore what is saved; all ranks meet once more at the end."""
    found = training.restore()
    step = 0 if found is None else found.step
    assert found in (None, Saved.of(step)), found
    training.move(step + 1)
    training.manager.save(step + 1)
    changes = Changes(moment("change"), stop)
    collectives.count = 0
    training.manager._session.comm.set_limits(deadline_seconds=float(deadline))
    with in_place_of_os(changes) if world.rank == 0 else contextlib.nullcontext():
        if kind == "slow" and world.rank == 0:
            slow_fsync(float(number))
        training.move(step + 2)
        if phase == "save":
            training.manager.save(step + 2)
        else:
            assert training.restore() == Saved.of(step + 1)
    training.manager.should_stop()
    put(f"done-{world.rank}", step + (2 if phase == "save" else 1))


collectives = Collectives(Moment(0, when), stop)
comm = collectives.watch(world)
world.Barrier()
at_first = float(deadline) if kind == "slow" else 50.0
with (
    collectives,
    Training(directory / "ckpt", comm=comm, deadline_seconds=at_first) as training,
):
    collectives._moment = moment("collective")
    collectives.count = -(10**6)  # not before `run` says so
    try:
        run(training, collectives)
    except CollectiveError as error:
        put(f"error-{world.rank}", error)
        everybody = [directory / f"error-{rank}" for rank in range(world.size)]
        # Whoever leaves ends the job, and the one that is stopped with it.
        assert wait_for(lambda: all(record.exists() for record in everybody), 60)
        raise
