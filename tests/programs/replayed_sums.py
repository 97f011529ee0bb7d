# SPDX-License-Identifier: Apache-2.0
"""Is cut off again and again after an epoch's sums were read: replayed_sums.py FOLDER"""

import sys
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt import Accumulator, CheckpointManager, EpochState, remaining_epochs_until

root = Path(sys.argv[1])
comm = MPI.COMM_WORLD


def run_until_cut_off(number: int) -> dict:
    """Run the program from its start, with states of its own, to its first save."""
    epochs = EpochState()
    sums = Accumulator(epochs=epochs)
    with CheckpointManager(root, [epochs, sums]) as manager:
        restored = manager.restore()
        assert (restored is None) == (number == 0)
        for _ in remaining_epochs_until(1, epochs):
            if restored is None:  # the samples were trained on before the first save
                sums["samples"] += comm.rank + 1
            with sums.synchronized():
                found = dict(sums)
                sums.clear()
            manager.save()
            break
    return found


for number in range(4):
    found = run_until_cut_off(number)
    assert found == {"samples": comm.size * (comm.size + 1) // 2}, (number, found)
print("the same each time")
