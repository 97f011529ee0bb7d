# SPDX-License-Identifier: Apache-2.0
"""Goes through faults of system calls of any rank, one after the other, in one job.

Arguments: file with the faults as JSON, file for what came of them, a line for each. A
fault is: workload, rank, system call, errno, number of the call or 0 for each in turn,
and whether all later calls fail as well. Two ranks at most share a host, or so they say.
"""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

from mpi4py import MPI

from tests.crash.faults import Fault, attempt, joint_workloads, quiet, workloads
from tests.crash.tracing import Traced
from tests.crash.world import pretend_hosts, scratch

asked, told = Path(sys.argv[1]), Path(sys.argv[2])
comm = MPI.COMM_WORLD
pretend_hosts(comm)
known = {workload.name: workload for workload in [*workloads(), *joint_workloads()]}
sandbox = comm.bcast(scratch() if comm.rank == 0 else None)


def report_of(workload, victim, fault):
    """Return what came of a fault, on every rank; whether it hit anything comes first."""
    made = []

    def make(wanted, place):
        made.append(Traced(wanted, place))
        return made[-1]

    outcome = attempt(workload, fault, sandbox, comm, victim, make, deadline_seconds=60)
    missed = any(record.missed for record in made)
    gathered = comm.allgather((outcome, missed))
    return {
        "fault": f"{workload.name}, rank {victim}: {fault}",
        "call": fault.call,
        "fired": any(record.fired for record, _ in gathered),
        "missed": any(missed for _, missed in gathered),
        "errors": [record.error for record, _ in gathered],
        "wrong": [line for record, _ in gathered for line in record.wrong],
        "seconds": [record.seconds for record, _ in gathered],
    }


with quiet(), told.open("w") if comm.rank == 0 else open(os.devnull, "w") as lines:
    for name, victim, call, code, number, forever in json.loads(asked.read_text()):
        for nth in [number] if number else itertools.count(1):
            report = report_of(known[name], victim, Fault(call, nth, code, forever))
            print(json.dumps(report), file=lines, flush=True)
            if not report["fired"] and not report["missed"]:
                break
if comm.rank == 0:
    shutil.rmtree(sandbox)
