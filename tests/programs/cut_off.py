# SPDX-License-Identifier: Apache-2.0
"""Saves again and again; each rank notes the error it ends with: cut_off.py FOLDER"""

import sys
from pathlib import Path

import numpy as np

from mpi_ckpt import ArrayState, CheckpointManager, Options
from mpi_ckpt.comm import Communicator
from mpi_ckpt.errors import CheckpointError

folder, world = Path(sys.argv[1]), Communicator()
weights = np.zeros(100_000)
states = [ArrayState("weights", {"w": weights})]
options = Options(interval=1, asynchronous=sys.argv[2] == "asynchronous")
try:
    with CheckpointManager(folder / "checkpoints", states, options=options) as manager:
        while not manager.step():
            weights += 1
            (folder / f"step-{world.rank}").write_text(f"{manager.steps}")
except CheckpointError as error:
    (folder / f"error-{world.rank}").write_text(f"{type(error).__name__}: {error}")
