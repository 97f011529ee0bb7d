# SPDX-License-Identifier: Apache-2.0
"""Run all checks: mpirun -n 2 python -m tests.device_checks."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mpi4py import MPI

from tests.device_checks import contents, costs  # noqa: F401 (they add their checks)
from tests.device_checks.bench import CHECKS, NeedsDevice, of_environment


def run(bench, check):
    """Run a check on all ranks; return its line, the same on each."""
    bench.comm.Barrier()
    start = time.perf_counter()
    try:
        verdict, figure = "ok", check.run(bench)
    except NeedsDevice:
        verdict, figure = "needs a device", ""
    except Exception as error:
        verdict, figure = "failed", f"{type(error).__name__}: {error}"[:300]
    found = bench.comm.allgather((verdict, figure))
    failed = [one for one in found if one[0] == "failed"]
    verdict, figure = failed[0] if failed else found[0]
    seconds = round(time.perf_counter() - start, 2)
    return {
        "check": check.name,
        "verdict": verdict,
        "figure": figure,
        "seconds": seconds,
        "device": bench.device,
        "ranks": bench.comm.size,
    }


def main():
    """Print a line of JSON for each check; return 1 if one has failed."""
    comm = MPI.COMM_WORLD
    made = tempfile.mkdtemp(prefix="device_checks") if comm.rank == 0 else None
    directory = Path(comm.bcast(made))
    bench = of_environment(comm, directory)
    failed = 0
    for check in CHECKS:
        line = run(replace(bench, directory=directory / check.name), check)
        failed += line["verdict"] == "failed"
        if comm.rank == 0:
            print(json.dumps(line), flush=True)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(directory)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
