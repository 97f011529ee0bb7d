# SPDX-License-Identifier: Apache-2.0
"""Run all checks: mpirun -n 2 python -m tests.device_checks [FILE]."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from mpi4py import MPI

from tests.device_checks import contents, costs  # noqa: F401 (they add their checks)
from tests.device_checks.bench import CHECKS, NeedsDevice, of_environment

# The last check has begun by then: all have ended before a limit of ten minutes.
SECONDS = float(os.environ.get("SECONDS_MAX", "450"))


def run(bench, check):
    """Run a check on all ranks; return its line, the same on each."""
    bench.comm.Barrier()
    start = time.perf_counter()
    figures = {}
    try:
        verdict, figure = "ok", check.run(replace(bench, figures=figures))
    except NeedsDevice:
        verdict, figure = "needs a device", ""
    except Exception as error:
        verdict, figure = "failed", f"{type(error).__name__}: {error}"[:300]
    found = bench.comm.allgather((verdict, figure))
    failed = [one for one in found if one[0] == "failed"]
    verdict, figure = failed[0] if failed else found[0]
    return {
        "check": check.name,
        "verdict": verdict,
        "figure": figure,
        "figures": figures,
        "seconds": round(time.perf_counter() - start, 2),
        "device": bench.device,
        "ranks": bench.comm.size,
    }


def machine(bench):
    """What the checks ran on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if bench.is_real:
        found["device"] = torch.cuda.get_device_name()
    mpi = MPI.Get_library_version().splitlines()[0]
    return {**found, "mpi": mpi, "ranks": bench.comm.size, "MiB": bench.mebibytes}


def main():
    """Print a line of JSON for each check; return 1 if one has failed."""
    comm = MPI.COMM_WORLD
    made = tempfile.mkdtemp(prefix="device_checks") if comm.rank == 0 else None
    directory = Path(comm.bcast(made))
    bench = of_environment(comm, directory)
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    lines, start = [], time.perf_counter()
    for check in CHECKS:
        if comm.bcast(time.perf_counter() - start) > SECONDS:
            break
        own = directory / check.name
        lines.append(run(replace(bench, directory=own), check))
        comm.Barrier()
        if comm.rank == 0:
            print(json.dumps(lines[-1]), flush=True)
            shutil.rmtree(own, ignore_errors=True)
            if file is not None:
                left = [one.name for one in CHECKS[len(lines) :]]
                answer = {"machine": machine(bench), "checks": lines, "not run": left}
                file.write_text(json.dumps(answer, indent=1) + "\n")
    if comm.rank == 0:
        shutil.rmtree(directory)
    return int(any(line["verdict"] == "failed" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
