# SPDX-License-Identifier: Apache-2.0
"""A training that saves to its hosts at every step, and is killed at one.

python local_training.py DIRECTORY LOCAL UPTO DIES NOTE [DRAIN]

DRAIN: bytes per second at which hosts copy each second step to the directory.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_ckpt import ArrayState, CheckpointManager, Local, Options, PerRankState, RNGState

directory, place, upto, dies, note, *drain = sys.argv[1:]
world = MPI.COMM_WORLD
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
weights = {f"w{n}": np.zeros(5000 + n) for n in range(8)}
own = PerRankState("own", 0)
states = [ArrayState("weights", weights), own, RNGState()]
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
    elif any((array != restored.step).any() for array in weights.values()):
        raise SystemExit(f"rank {world.rank} has other weights than those of its step")
    for _ in range(manager.steps, int(upto)):
        for array in weights.values():
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
    if dies == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    manager.save()
