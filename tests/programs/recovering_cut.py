# SPDX-License-Identifier: Apache-2.0
"""A field is cut over ranks that are killed: recovering_cut.py ROOT LOG KILLS [replace].

KILLS are words STEP:RANK,RANK; copy:RANK and copied:RANK die in the middle of a copy. Each
step adds to each row a sum over all rows: one that is lost or doubled shows in all others.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import numpy as np

from mpi_ckpt import (
    ArrayState,
    Block,
    CheckpointManager,
    ConcatState,
    Options,
    ShardedArrayState,
    elastic,
)
from mpi_ckpt.engine.save import copies
from tests.event_log import note_event

ROOT, LOG, KILLS = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split()
REPLACE = "replace" in sys.argv
ROWS, STEPS = 23, 30


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_if_told(world: elastic.World, step: int) -> None:
    """Kill this rank, if it is its turn: the n-th kill comes after n-1 recoveries."""
    if world.failures >= len(KILLS):
        return
    when, _, ranks = KILLS[world.failures].partition(":")
    if when == str(step) and world.rank in map(int, ranks.split(",")):
        die()


def die_in_a_copy(world: elastic.World) -> None:
    """Let this rank die where the others have its tiles, or where they do not."""
    if world.failures >= len(KILLS) or world.is_replacement:
        return
    when, _, rank = KILLS[world.failures].partition(":")
    places = {"copy": (copies, "_exchange"), "copied": (copies, "stage")}
    if when not in places or world.rank != int(rank):
        return
    module, name = places[when]
    call, calls = getattr(module, name), iter(range(1000))

    def replaced(*args: object, **options: object) -> object:
        if next(calls) == 3:
            die()
        return call(*args, **options)

    setattr(module, name, replaced)


def train(world: elastic.World) -> None:
    first, end = (ROWS * n // world.size for n in (world.rank, world.rank + 1))
    field = np.repeat(np.arange(first, end, dtype=float)[:, None], 400, axis=1)
    states = [
        ShardedArrayState("field", {"x": Block.rows(field, world.comm)}),
        ConcatState("rows", {"i": np.arange(first, end)}),
        ArrayState("n", {"n": np.zeros(1)}),
    ]
    options = Options(interval=12, deadline_seconds=60)
    with CheckpointManager(
        ROOT, states, comm=world.comm, memory=world.memory, options=options
    ) as manager:
        restored = manager.restore()
        note_event(
            LOG,
            world,
            size=world.size,
            step=manager.steps,
            source="nothing"
            if restored is None
            else "memory"
            if restored.from_memory
            else "files",
        )
        die_in_a_copy(world)
        manager.remember()
        while manager.steps < STEPS:
            total = np.empty(1)
            world.comm.Allreduce(field[:, 0].sum(keepdims=True), total)
            field += total[0] % 7
            states[2].arrays["n"] += 1
            die_if_told(world, manager.steps + 1)
            manager.step()
        manager.save()
        rows = world.comm.gather((field[:, 0].tolist(), states[1].arrays["i"].tolist()))
    if world.rank == 0:
        field, numbers = ([value for one in rows for value in one[k]] for k in (0, 1))
        note_event(LOG, world, field=field, rows=numbers, n=states[2].arrays["n"][0])


logging.basicConfig(format="%(message)s")
elastic.run(train, replace=REPLACE, memory=elastic.Memory(every=5), start_seconds=90)
