# SPDX-License-Identifier: Apache-2.0
"""A training that loses a rank at one place: recovering.py ROOT LOG HOW [replace] [SPARES].

Adds up the same sums with any number of ranks, and tells how it came to them.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ckpt import ArrayState, CheckpointManager, Options, elastic
from mpi_ckpt.comm import agreement
from mpi_ckpt.comm.ulfm.guard import Guard
from mpi_ckpt.elastic import running
from mpi_ckpt.errors import CollectiveError
from mpi_ckpt.storage import filesystem
from tests.event_log import note_event

ROOT, LOG, HOW = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
REPLACE = "replace" in sys.argv
SPARES = int(sys.argv[-1]) if sys.argv[-1].isdecimal() else 0
STEPS = 30
WAITING_DIES = ("waiting", "waiting_then_errors", "both")
STARTING = ("merge", "newcomer", "starter", "unstartable")

# The package has a function of that name.
repair = sys.modules["mpi_ckpt.comm.ulfm.repair"]
spawning = repair.spawning


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def before(module: object, name: str, condition) -> None:  # type: ignore[no-untyped-def]
    """Let this process die when it is about to call a function, if that is the time."""
    call = getattr(module, name)

    def replaced(*args: object, **options: object) -> object:
        if condition(*args):
            die()
        return call(*args, **options)

    setattr(module, name, replaced)


def fail_to_start(start: object) -> object:
    """Stand in for what starts a new rank: it cannot, as where no slot is free."""
    if start._handle.rank == start._starter:  # type: ignore[attr-defined]
        raise MPI.Exception(MPI.ERR_SPAWN)
    return MPI.COMM_NULL


def is_first_time() -> bool:
    """Tell whether this is asked for the first time, by this job or one of before."""
    mark = LOG.with_name("asked")
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def arrange(world: elastic.World) -> None:
    """Prepare the death of one rank of the first world."""
    if world.failures or world.is_replacement:
        return
    if HOW == "publish" and world.rank == 0:
        # The second generation is whole, but for its name.
        def is_second(source: Path, *_: object) -> bool:
            return source.name.startswith(".partial-00000002")

        before(filesystem, "rename_new", is_second)
    if HOW == "write" and world.rank == 0:
        before(filesystem, "sync_file", lambda *_: any(ROOT.glob(".partial-00000002*/*")))
    if HOW == "ours" and world.rank == 1:
        calls = iter(range(1000))
        before(agreement.Vote, "exchange", lambda *_: next(calls) == 20)
    if HOW == "order" and world.rank == 1:
        before(repair, "_order", lambda *_: True)
    if HOW == "shrink" and world.rank == 1:
        before(repair, "_shrink", lambda *_: True)
    if HOW == "merge" and world.rank == 1:
        before(repair, "_merge", lambda *_: is_first_time())
    if HOW == "starter" and world.rank == 3:
        # It is the one that starts another, and dies while that starts.
        before(spawning.Start, "begin", lambda *_: threading.Timer(0.05, die).start())
    if HOW == "unstartable":
        spawning.Start.begin = fail_to_start
    if HOW == "met" and world.rank == 1:
        before(running, "repair", lambda *_: True)


def at_step(world: elastic.World, step: int) -> None:
    """Do to this rank what is to be done at a step."""
    if step != 15 or world.failures:
        return
    if world.rank == 2 and HOW in ("order", "shrink", "met", "again", *STARTING):
        die()
    if HOW == "stopped" and world.rank == 1:
        die(signal.SIGSTOP)
    if HOW == "error" and world.rank == 1:
        raise ValueError("bad luck")
    if HOW == "errors":
        raise ValueError("the same everywhere")
    if HOW in WAITING_DIES:
        if world.rank == 0:
            os.kill(int(WAITING.read_text()), signal.SIGKILL)
            time.sleep(0.5)
        world.comm.Barrier()
    if HOW == "both" and world.rank == 1:
        die()
    if HOW == "waiting_then_errors":
        raise ValueError("the same everywhere")
    if HOW == "asked" and world.rank == 0:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(int(WAITING.read_text()), number)
    if HOW == "stuck" and world.rank == 1:
        with Guard("a call of MPI", 0.2):
            time.sleep(60)
    if HOW in ("plain", "leave") and world.rank == 1:
        die()


def train(world: elastic.World) -> float:
    arrange(world)
    sums = ArrayState("sums", {"x": np.zeros(1000), "n": np.zeros(1)})
    options = Options(interval=10, deadline_seconds=60)
    with CheckpointManager(
        ROOT, [sums], comm=world.comm, memory=world.memory, options=options
    ) as manager:
        # In the middle of coming back, another one goes.
        if HOW == "again" and world.failures == 1 and world.rank == 1:
            before(agreement.Vote, "exchange", lambda *_: True)
        restored = manager.restore()
        note_event(
            LOG,
            world,
            size=world.size,
            spares=world.spares,
            failures=world.failures,
            step=manager.steps,
            memory=restored is not None and restored.from_memory,
            partials=[path.name for path in ROOT.glob(".partial-*")],
        )
        while manager.steps < STEPS:
            mine = np.arange(12)[world.rank :: world.size].sum(dtype=float)
            total = np.empty(1000)
            world.comm.Allreduce(np.full(1000, mine), total)
            sums.arrays["x"] += total
            sums.arrays["n"] += 1
            at_step(world, manager.steps + 1)
            if HOW == "leave" and world.failures and manager.steps == 20:
                sys.exit(7)
            manager.step()
        save_late(world, manager) if HOW == "late" else manager.save()
    note_event(LOG, world, value=sums.arrays["x"][0], n=sums.arrays["n"][0])
    return float(sums.arrays["x"][0])


def save_late(world: elastic.World, manager: CheckpointManager) -> None:
    """Let rank 1 come to a save when all others have given up waiting for it."""
    # From here on only: what a slow disk takes for earlier saves must not exceed it.
    manager._session.comm.deadline_seconds = 3
    while world.rank == 1 and len(list(LOG.parent.glob("gave-up-*"))) < world.size - 1:
        time.sleep(0.01)
    try:
        manager.save()
    except CollectiveError:
        (LOG.parent / f"gave-up-{world.rank}").touch()
        raise


# The alarm that ends a new rank which does not come in tells it from the first ones. This
# is before MPI is started: whoever starts it waits in MPI_Comm_spawn.
if HOW == "newcomer" and signal.getitimer(signal.ITIMER_REAL)[0] > 0 and is_first_time():
    die()
if HOW == "merge":
    # What Open MPI writes until then fills a disk.
    spawning._CONNECT_SECONDS = 3.0
logging.basicConfig(format="%(message)s")
if HOW == "stopped":
    # A rank answers heartbeats in MPI only: a slow disk would make it a lost one.
    os.fsync = lambda descriptor: None
limit = 0 if HOW == "too_many" else 20
if HOW == "too_many":
    HOW = "plain"
WAITING = LOG.with_name("waiting")
if HOW in (*WAITING_DIES, "asked") and MPI.COMM_WORLD.rank == 3:
    WAITING.write_text(str(os.getpid()))
# What is registered first comes last, and then mpi4py's MPI_Finalize.
atexit.register(print, "on the way to MPI_Finalize", flush=True)
value = elastic.run(
    train, replace=REPLACE, spares=SPARES, max_recoveries=limit, start_seconds=90
)
print(f"returned {value}", flush=True)
