# SPDX-License-Identifier: Apache-2.0
"""A training on hosts of its own loses ranks: recovering_local.py ROOT LOG HOW [SPARES].

Each rank is on a host of its own, by name. The hosts keep every second step, and copy each
tenth to the directory behind the training, which takes so long that a copy is always under
way. HOW has the words: "root" or "last", who is lost; "disk", if with its disk; "memory",
if there are copies in memory; "replace", if new ranks are started; "saving", if it is lost
while the hosts give a generation its name.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ckpt import (
    ArrayState,
    Block,
    CheckpointManager,
    Local,
    Options,
    PerRankState,
    ShardedArrayState,
    elastic,
)
from mpi_ckpt.storage.writing.partial import Partial
from tests.event_log import note_event

ROOT, LOG, HOW = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split()
SPARES = int(sys.argv[4]) if len(sys.argv) > 4 else 0
STEPS, ROWS = 30, 23
SLOW = 1.0

# A new rank says that it is the first one of a job: of its own.
HOST = f"host{MPI.COMM_WORLD.rank}" + "-new" * (MPI.Comm.Get_parent() != MPI.COMM_NULL)
socket.gethostname = lambda: HOST


def die() -> None:
    if "disk" in HOW:
        # In one step: a thread of this process may be removing a retired generation there.
        (ROOT / "local" / HOST).rename(ROOT / f"lost-{HOST}")
    os.kill(os.getpid(), signal.SIGKILL)


def is_lost(world: elastic.World) -> bool:
    """Return whether this rank is the one to be lost in the first world."""
    return world.failures == 0 and world.rank == (0 if "root" in HOW else world.size - 1)


def die_while_saving() -> None:
    """Let this process die before it gives the next local generation its name."""

    Partial.appear = lambda _: die()


def train(world: elastic.World) -> None:
    first, end = (ROWS * n // world.size for n in (world.rank, world.rank + 1))
    field = np.zeros((end - first, 50))
    own = PerRankState("own", 0, resize=lambda values, size: [values[0]] * size)
    sums = ArrayState("sums", {"x": np.zeros(5000)})
    states = [sums, own, ShardedArrayState("field", {"x": Block.rows(field, world.comm)})]
    options = Options(interval=10, deadline_seconds=60)
    local = Local(f"{ROOT}/local/{{host}}", every=2, reserve=0, drain=SLOW)
    with CheckpointManager(
        ROOT / "run",
        states,
        comm=world.comm,
        options=options,
        memory=world.memory if "memory" in HOW else None,
        local=local,
    ) as manager:
        restored = manager.restore()
        assert own.value == manager.steps
        assert (field == 66.0 * manager.steps).all()
        note_event(
            LOG,
            world,
            size=world.size,
            step=manager.steps,
            level=None if restored is None else restored.level,
            partials=len(list((ROOT / "run").glob(".partial-*"))),
        )
        level = manager._session.hosts
        while manager.steps < STEPS:
            total = np.empty(5000)
            mine = np.arange(12)[world.rank :: world.size].sum(dtype=float)
            world.comm.Allreduce(np.full(5000, mine), total)
            sums.arrays["x"] += total
            field += total[0]
            own.value = manager.steps + 1
            if is_lost(world) and manager.steps + 1 == 17:
                assert level.drain.is_under_way
                die_while_saving() if "saving" in HOW else die()
            manager.step()
        failures = level.failures
        copied = level.drain.is_under_way
        manager.save().wait()
    note_event(
        LOG,
        world,
        value=sums.arrays["x"][0],
        failures=failures,
        copied=copied,
        partials=len(list((ROOT / "run").glob(".partial-*"))),
    )


logging.basicConfig(format="%(message)s")
elastic.run(train, replace="replace" in HOW, spares=SPARES, start_seconds=90)
