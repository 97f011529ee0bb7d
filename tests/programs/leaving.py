# SPDX-License-Identifier: Apache-2.0
"""Leaves in every way a program can: leaving.py FOLDER HOW WHO [OPTION=VALUE ...]

HOW is what the ranks named by WHO do (a rank, or ``all``) after a first save; the others
then train on, which is to wait for them in an allreduce, if they do not leave as well.
"""

import ast
import logging
import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

from mpi_ckpt import ArrayState, CheckpointManager, Options
from mpi_ckpt.engine import abort
from mpi_ckpt.options import IO
from mpi_ckpt.storage import filesystem
from tests.launch import launchers_of

SIZE = 1 << 17  # doubles; written by a pool of threads, as all that goes direct

logging.basicConfig(format="%(levelname)s %(message)s")
folder, how, who, *given = sys.argv[1:]
options = {name: ast.literal_eval(value) for name, value in (o.split("=") for o in given)}
comm = MPI.COMM_WORLD
mine = who in ("all", str(comm.rank))
array = np.ones(SIZE)
# Who leaves alone waits in vain; where all leave, a slow machine must have its time.
abort._ERROR_SECONDS = abort._EXIT_SECONDS = 30.0 if who == "all" else 0.5


def make() -> CheckpointManager:
    return CheckpointManager(
        folder,
        [ArrayState("a", {"x": array})],
        options=Options(io=IO(mode="direct"), **options),
    )


def slow_fsync(seconds: float) -> None:
    """Let the next save take a while."""
    real = filesystem.sync_file

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        real(descriptor)

    filesystem.sync_file = slow


def refuse_fsync() -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(5, "no luck today")

    filesystem.sync_file = refuse


def fail() -> None:
    raise ValueError(f"bad luck of rank {comm.rank}")


def raise_inside() -> None:
    with make() as manager:
        manager.save()
        if mine:
            fail()
        comm.allreduce(1)


def raise_outside() -> None:
    manager = make()
    manager.save()
    if mine:
        fail()
    comm.allreduce(1)


def be_lost() -> None:
    """Die in a training that nobody calls again: it knows nothing of recovery."""
    manager = make()
    manager.save()
    if mine:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    manager.save()


def raise_after() -> None:
    """Leave the block by an error that is caught, and fail for good later."""
    manager = make()
    try:
        with manager:
            manager.save()
            if mine:
                fail()
            comm.allreduce(1)
    except ValueError:
        raise RuntimeError("cannot go on") from None


def raise_unheard() -> None:
    """Fail on a machine so busy that the launcher has no turn when this rank says why."""
    launcher = launchers_of(os.getppid())
    write = abort._write

    def write_unheard(text: str) -> None:
        if "aborted" in text:
            for process in launcher:
                os.kill(process, signal.SIGSTOP)
            if os.fork() == 0:
                time.sleep(0.1)
                for process in reversed(launcher):
                    os.kill(process, signal.SIGCONT)
                os._exit(0)
        write(text)

    abort._write = write_unheard
    raise_outside()


def agreed_error() -> None:
    # mpirun reads what a rank says in pieces of a page: in a longer text another rank's
    # may come in between.
    sys.tracebacklimit = 2
    with make() as manager:
        manager.save()
        refuse_fsync()
        array[:] = 2
        manager.save()


def exit_inside() -> None:
    with make() as manager:
        manager.save()
        if mine:
            sys.exit(7)
        comm.allreduce(1)


def exit_early() -> None:
    with make() as manager:
        manager.save()
        if mine:
            sys.exit(0)


def print_only() -> None:
    """Call the hook by hand, as some programs do to print what they have caught."""
    with make() as manager:
        manager.save()
        try:
            fail()
        except ValueError:
            sys.excepthook(*sys.exc_info())
        comm.barrier()
        time.sleep(0.5)
    print("went on")


def pending_exit() -> None:
    manager = make()
    manager.save().wait()
    slow_fsync(0.5)
    array[:] = 2
    manager.save()
    sys.exit(0)


def pending_exit_failing() -> None:
    manager = make()
    manager.save().wait()
    refuse_fsync()
    array[:] = 2
    manager.save()
    sys.exit(0)


def pending_exit_stuck() -> None:
    # A slow disk must not be what exceeds the deadline, in the first save.
    os.fsync = lambda descriptor: None
    comm.barrier()  # nor what the ranks' starts are apart
    manager = make()
    manager.save().wait()
    slow_fsync(1000)
    array[:] = 2
    manager.save()
    sys.exit(0)


def pending_raise() -> None:
    with make() as manager:
        manager.save().wait()
        slow_fsync(1.0)
        array[:] = 2
        manager.save()
        if mine:
            fail()
        comm.allreduce(1)


def pending_dropped() -> None:
    manager = make()
    manager.save().wait()
    slow_fsync(0.5)
    array[:] = 2
    manager.save()
    del manager
    print("dropped")


def pending_close_at_exit() -> None:
    import atexit

    manager = make()
    atexit.register(manager.close)
    manager.save().wait()
    slow_fsync(0.2)
    array[:] = 2
    manager.save()


def restore() -> None:
    with make() as manager:
        report = manager.restore()
        if comm.rank == 0:
            print(f"generation {report.generation} of {array[0]:.0f} {array[-1]:.0f}")


globals()[how]()
