# SPDX-License-Identifier: Apache-2.0
"""The cold start of a job, up to its first step: import, start, restore.

python -m benchmarks start [--ranks 1 2 4] [--bytes 1200000000] [--repeats 5] [--json FILE]
python -m benchmarks start --smoke

Starts jobs itself, so it is called without mpirun. The page cache is dropped before each
job, with what it holds of Python and MPI where that is allowed. The state is of NumPy
arrays: the import of a framework comes to these times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import ceilings
from benchmarks.harness import idle_share

__all__ = ["PHASES", "main"]

PHASES = ("launch", "import", "state", "manager", "restore", "step")
"""Each ends where the next begins: Python runs; MPI and we are imported; the program has
made its arrays; the manager is made; the states are restored; a step is taken."""

_SMOKE_BYTES = 4_000_000
_LIMIT_SECONDS = 300
_JOB = Path(__file__).with_name("start_job.py")


def measure(ranks: int, nbytes: int, folder: Path) -> dict[str, float]:
    """Return the seconds of each phase on the rank that was last, and of all together."""
    ceilings.drop_cache(folder, everything=True)
    command = [
        *("mpirun", "-n", str(ranks), sys.executable, str(_JOB)),
        *(str(folder), str(nbytes)),
    ]
    began = time.time()
    done = subprocess.run(
        [*command, str(began)],
        capture_output=True,
        text=True,
        timeout=_LIMIT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"the job of {ranks} ranks has failed:\n{done.stderr[-3000:]}")
    ends: dict[str, float] = json.loads(done.stdout)
    spent, before = {}, 0.0
    for phase in PHASES:
        spent[phase] = ends[phase] - before
        before = ends[phase]
    return {**spent, "all": before}


def main(argv: list[str]) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks start")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--bytes", type=int, default=1_200_000_000, help="of the state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the file system to measure")
    parser.add_argument("--json", type=Path, help="append a line a measurement")
    parser.add_argument("--smoke", action="store_true", help="tiny: only that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.ranks, args.bytes, args.repeats = [2], _SMOKE_BYTES, 1
    print(f"# state of {args.bytes / 1e9:g} GB, cold; seconds, median of {args.repeats}")
    print("".join(f"{word:>9}" for word in ("# ranks", *PHASES, "all", "idle")))
    with tempfile.TemporaryDirectory(prefix="start-", dir=args.directory) as name:
        folder = Path(name)
        measure(1, args.bytes, folder)  # nothing to restore: it saves
        for ranks in args.ranks:
            idle = idle_share(1.0)
            taken = [measure(ranks, args.bytes, folder) for _ in range(args.repeats)]
            medians = {key: statistics.median(t[key] for t in taken) for key in taken[0]}
            columns = [f"{seconds:9.3f}" for seconds in medians.values()]
            print(f"{ranks:9}{''.join(columns)}{idle:9.0%}", flush=True)
            if args.json is not None:
                line = {
                    "case": "start", "ranks": ranks, "nbytes": args.bytes, "taken": taken,
                    "idle": idle, "time": time.time(),
                }  # fmt: skip
                with args.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")
