# SPDX-License-Identifier: Apache-2.0
"""A training that saves to its hosts at every step, and is killed at one.

python local_training.py DIRECTORY LOCAL UPTO HOW NOTE [DRAIN]

HOW: "dies" with all its processes; "loses" its last rank, unless it has restored; "waits"
for its end, unless it has restored; "ends". DRAIN: bytes per second at which hosts copy
each second step to the directory.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
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
    RNGState,
    ShardedArrayState,
)

ROWS = 7

directory, place, upto, how, note, *drain = sys.argv[1:]
world = MPI.COMM_WORLD
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
weights = {f"w{n}": np.zeros(5000 + n) for n in range(8)}
own = PerRankState("own", 0)
first, end = (ROWS * rank // world.size for rank in (world.rank, world.rank + 1))
field = np.zeros((end - first, 900))
cut = ShardedArrayState("field", {"x": Block.rows(field, world)})
states = [ArrayState("weights", weights), own, RNGState(), cut]
options = Options(
    asynchronous=True,
    deadline_seconds=40,
    preemption_signals=(),
    interval=2 if drain else None,
)
local = Local(place, reserve=0, drain=float(drain[0]) if drain else None)
with CheckpointManager(directory, states, options=options, local=local) as manager:
    restored = manager.restore()
    if restored is None:
        manager.sync()
    elif any((array != restored.step).any() for array in (field, *weights.values())):
        raise SystemExit(f"rank {world.rank} has other values than those of its step")
    for _ in range(manager.steps, int(upto)):
        for array in (field, *weights.values()):
            array += 1
        own.value = manager.steps + 1
        manager.step()
        manager.save(level="local").wait()
    if world.rank == 0:
        level = None if restored is None else restored.level
        step = None if restored is None else restored.step
        hosts = manager._session.hosts
        told = {"level": level, "step": step, "failures": hosts.failures}
        Path(note).write_text(json.dumps(told))
    world.Barrier()
    if how == "dies" or (how == "loses" and not restored and world.rank == world.size - 1):
        os.kill(os.getpid(), signal.SIGKILL)
    while how in ("loses", "waits") and not restored:
        time.sleep(1)
    manager.save()
