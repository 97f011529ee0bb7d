# SPDX-License-Identifier: Apache-2.0
"""Counts steps until it is told to stop: stoppable.py FOLDER NOTES [SAVE RESTORE]

A save takes SAVE seconds, a restore RESTORE seconds; when one begins each rank leaves a
note. Root notes the steps it has taken.
"""

import sys
import time
from pathlib import Path

from mpi_ckpt import CheckpointManager, ObjectState, Options, StopWhen

root, notes = Path(sys.argv[1]), Path(sys.argv[2])
save_seconds, restore_seconds = map(float, sys.argv[3:] or (0, 0))


class Counter(ObjectState):
    """Counts, and takes its time."""

    rank = -1

    def capture(self):
        self._dawdle("save", save_seconds)
        return super().capture()

    def accept(self, value):
        self._dawdle("restore", restore_seconds)
        super().accept(value)

    def _dawdle(self, doing, seconds):
        (notes / f"{doing}-{self.rank}").touch()
        time.sleep(seconds)


counter = Counter("counter", 0)
options = Options(interval=5, stop=StopWhen(margin_seconds=1))
with CheckpointManager(root, [counter], options=options) as manager:
    from mpi4py import MPI

    counter.rank = MPI.COMM_WORLD.rank
    manager.restore()
    if manager.is_root:
        print("resumed at", manager.steps)
    while not manager.step():
        counter.value += 1
        if manager.is_root:
            (notes / "steps").write_text(str(manager.steps))
        time.sleep(0.01)
    newest = manager.generations()[-1]
    if manager.is_root:
        print("stopped at", manager.steps, "of", newest.step)
    sys.exit(manager.exit_code)
