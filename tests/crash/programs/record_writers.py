# SPDX-License-Identifier: Apache-2.0
"""Records on every rank what saves of several writers do.

Arguments: sandbox (holds the base), file for the records, "asynchronous" or "blocking".
"""

import json
import sys
from pathlib import Path

from mpi4py import MPI

from tests.crash.recorder import Recorder, in_place_of_os, to_json
from tests.crash.scenarios import ROOT, Run, Scenario
from tests.crash.world import Saved, Training

sandbox, out, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
comm = MPI.COMM_WORLD
recorder = Recorder(sandbox)
scenario = Scenario("several writers", saves=[Saved.of(1)])
run = Run(scenario, sandbox, recorder)
options = {"writers": "all", "asynchronous": way == "asynchronous", "comm": comm}
with in_place_of_os(recorder), Training(sandbox / ROOT, keep=1, **options) as training:
    assert training.restore() == Saved.of(1)
    run.save(training, 2)
    run.save(training, 3, moved=["plain"])
    run.save(training, 4)
records = comm.gather((recorder.times, to_json(recorder.ops)))
if comm.rank == 0:
    out.write_text(json.dumps(records))
