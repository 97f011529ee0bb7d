# SPDX-License-Identifier: Apache-2.0
"""A state raises OSError on one rank in each of its methods; what do the ranks raise?

Arguments: checkpoint directory, file for the errors of each case, rank by rank.
"""

import errno
import json
import os
import sys
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt import CheckpointManager, Options
from mpi_ckpt.errors import CheckpointError
from tests.crash.world import Plain, plain_at

root, told = Path(sys.argv[1]), Path(sys.argv[2])
comm = MPI.COMM_WORLD


class Fragile(Plain):
    """Fails in one method on one rank."""

    fails: tuple[str, int] = ("", 0)

    def _maybe_fail(self, method):
        if self.fails == (method, comm.rank):
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/some/where")

    def save(self, fileobj):
        self._maybe_fail("save")
        super().save(fileobj)

    def load(self, fileobj):
        self._maybe_fail("load")
        super().load(fileobj)

    def sync(self):
        self._maybe_fail("sync")


state = Fragile()
results = []
options = Options(preemption_signals=(), deadline_seconds=20)
manager = CheckpointManager(root, [state], comm=comm, options=options)
state.value = plain_at(1)
manager.save(1)
for method, rank in (("save", 0), ("load", 0), ("load", 1), ("sync", 0), ("sync", 1)):
    state.fails = (method, rank)
    error = None
    try:
        manager.restore() if method == "load" else manager.save(2)
    except CheckpointError as caught:
        error = (type(caught).__name__, str(caught))
    results.append(comm.gather(error))
    state.fails = ("", 0)
    assert manager.restore().step == 1
    assert state.value == plain_at(1)
manager.save(3)
assert manager.restore().step == 3
manager.close()
if comm.rank == 0:
    told.write_text(json.dumps(results))
