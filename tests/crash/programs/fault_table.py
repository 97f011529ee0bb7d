# SPDX-License-Identifier: Apache-2.0
"""Goes through faults of any rank, one after the other, in one job.

Two ranks at most share a host, or so they say. Arguments: file with the faults as JSON,
file for what came of them, a line for each. A fault is: workload, rank, call, number, errno
or how a listing lies, and whether all later calls fail as well. Faults that cannot happen
are left out.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt.storage.directory import catalog
from tests.crash.faults import (
    Fault,
    Lie,
    attempt,
    count_calls,
    joint_workloads,
    quiet,
    workloads,
)
from tests.crash.world import pretend_hosts, scratch

DEADLINE = {"deadline_seconds": 60}

# A listing that goes on lying is looked at again, after pauses that show nothing here.
catalog._PAUSES_SECONDS = (0.0, 0.0, 0.0)


def fault_of(call, number, how, forever):
    """Return a fault with an error, or of a listing that lies."""
    if isinstance(how, str):
        return Lie(call, number, 0, forever, how)
    return Fault(call, number, how, forever)


asked, told = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
comm = MPI.COMM_WORLD
pretend_hosts(comm)
known = {workload.name: workload for workload in [*workloads(), *joint_workloads()]}
sandbox = comm.bcast(scratch() if comm.rank == 0 else None)

with quiet(), told.open("w") if comm.rank == 0 else open(os.devnull, "w") as lines:
    calls = {
        name: comm.allgather(count_calls(known[name], sandbox, comm, **DEADLINE))
        for name in sorted({name for name, *_ in asked})
    }
    for name, victim, *fault in asked:
        call, number, *_ = fault
        if number > calls[name][victim][call]:
            continue
        drawn = fault_of(*fault)
        outcome = attempt(known[name], drawn, sandbox, comm, victim, **DEADLINE)
        gathered = comm.gather(outcome)
        if comm.rank == 0:
            report = {
                "fault": f"{name}, rank {victim}: {drawn}",
                "fired": any(record.fired for record in gathered),
                "errors": [record.error for record in gathered],
                "wrong": [line for record in gathered for line in record.wrong],
                "seconds": [record.seconds for record in gathered],
            }
            print(json.dumps(report), file=lines, flush=True)
if comm.rank == 0:
    shutil.rmtree(sandbox)
