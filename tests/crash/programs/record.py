# SPDX-License-Identifier: Apache-2.0
"""Records on root what some saves do; on other ranks any touch of a file is an error.

Arguments: sandbox (made here), file for the record.
"""

import sys
from pathlib import Path

from mpi4py import MPI

from tests.crash.faults import Untouched
from tests.crash.recorder import Recorder, in_place_of_os, to_json
from tests.crash.world import Saved, Training

sandbox, out = Path(sys.argv[1]), Path(sys.argv[2])
comm = MPI.COMM_WORLD
if comm.rank == 0:
    sandbox.mkdir()
stand_in = Recorder(sandbox) if comm.rank == 0 else Untouched()
with in_place_of_os(stand_in), Training(sandbox / "ckpt", keep=2, comm=comm) as training:
    assert training.restore() is None
    for step in (1, 2, 3):
        training.save(step)
    training.save(4, only=["plain"])
    assert training.restore() == Saved(4, 3, 4)
if comm.rank == 0:
    out.write_text(to_json(stand_in.ops))
