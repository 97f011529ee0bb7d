# SPDX-License-Identifier: Apache-2.0
"""Counts steps, saves every fifth, until it is told to stop: steady.py FOLDER"""

import sys
import time

from mpi_ckpt import CheckpointManager, ObjectState, Options

counter = ObjectState("counter", 0)
with CheckpointManager(sys.argv[1], [counter], options=Options(interval=5)) as manager:
    manager.restore()
    while not manager.step():
        counter.value += 1
        time.sleep(0.01)
    sys.exit(manager.exit_code)
