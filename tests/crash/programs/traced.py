# SPDX-License-Identifier: Apache-2.0
"""Runs root under strace, which fails one of its system calls; the others as they are.

Arguments: directory, what strace shall inject. Then, as the program: save, note the error.
"""

import json
import os
import sys
from pathlib import Path

directory, inject = Path(sys.argv[1]), sys.argv[2]

if inject:
    # Each launcher says the rank before MPI starts.
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
    command = [sys.executable, __file__, str(directory), ""]
    if rank == "0":
        call = inject.partition(":")[0]
        trace = ["-e", f"trace={call}", "-e", f"inject={inject}"]
        command = ["strace", "-f", "-qq", "-o", str(directory / "trace"), *trace, *command]
    os.execvp(command[0], command)

from mpi4py import MPI  # noqa: E402

from mpi_ckpt.errors import CheckpointError  # noqa: E402
from tests.crash.world import Saved, Training, leftovers  # noqa: E402

comm = MPI.COMM_WORLD
errors = []
with Training(directory / "ckpt", comm=comm, deadline_seconds=20) as training:
    for step in range(1, 5):
        error = None
        try:
            training.save(step)
        except CheckpointError as caught:
            error = [type(caught).__name__, str(caught)]
        errors.append(comm.gather(error))
    assert training.restore() == Saved.of(4)
if comm.rank == 0:
    assert not leftovers(directory / "ckpt")
    (directory / "told").write_text(json.dumps(errors))
