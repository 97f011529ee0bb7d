# SPDX-License-Identifier: Apache-2.0
"""From a lost rank to the first step after it: in place, and by starting again.

python -m benchmarks recovery [--ranks 2 4] [--bytes 1200000000] [--repeats 3] [--json FILE]
python -m benchmarks recovery --smoke

Starts jobs itself, so it is called without mpirun. Open MPI only. A job saves, takes three
more steps, and loses its last rank by SIGKILL. "seen" is when the first survivor's call
fails, "on" when all have restored and taken a step; starting again is mpirun's end, a new
mpirun at once, and a restore from files that are still in the page cache.
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

from benchmarks.harness import idle_share

__all__ = ["main"]

HOWS = ("fewer", "spare", "replaced", "restarted")
WORDS = {
    "fewer": "in place, one rank less",
    "spare": "in place, with a spare",
    "replaced": "in place, with a new rank",
    "restarted": "started again",
}
_FLAGS = (
    *("--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1"),
    *("--mca", "btl", "self,sm,tcp", "--mca", "mtl", "^ofi"),
)
_SMOKE_BYTES = 4_000_000
_LIMIT_SECONDS = 300
_JOB = Path(__file__).with_name("recovery_job.py")


def measure(ranks: int, nbytes: int, how: str) -> dict[str, float]:
    """Return seconds from the kill, and from its being seen, to going on."""
    flags = () if how == "restarted" else ("--with-ft", "ulfm")
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        command = [
            *("mpirun", *flags, *_FLAGS, "-n", str(ranks + (how == "spare"))),
            sys.executable,
            *(str(_JOB), name, str(nbytes), how),
        ]
        for _ in range(2 if how == "restarted" else 1):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False
            )
        if not (folder / "on").exists():
            raise SystemExit(
                f"{how} with {ranks} ranks did not go on:\n{done.stderr[-3000:]}"
            )

        def at(event: str) -> float:
            return int((folder / event).read_text()) / 1e9

        # Nothing of a job that is started again sees the loss but its launcher.
        seen = at("died") if how == "restarted" else at("seen")
        return {"from_kill": at("on") - at("died"), "from_seen": at("on") - seen}


def main(argv: list[str]) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks recovery")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--bytes", type=int, default=1_200_000_000, help="of the state")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append a line a measurement")
    parser.add_argument("--smoke", action="store_true", help="tiny: only that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.ranks, args.bytes, args.repeats = [2], _SMOKE_BYTES, 1
    print(f"# state of {args.bytes / 1e9:g} GB; seconds, median (least to most)")
    print(
        f"# {'ranks':>5}  {'':27} {'seen to going on':>24} {'killed to going on':>24}  idle"
    )
    for ranks in args.ranks:
        for how in HOWS:
            idle = idle_share(1.0)
            taken = [measure(ranks, args.bytes, how) for _ in range(args.repeats)]
            columns = [_spread([times[key] for times in taken]) for key in taken[0]][::-1]
            print(
                f"{ranks:7}  {WORDS[how]:27} {columns[0]:>24} {columns[1]:>24}  {idle:.0%}",
                flush=True,
            )
            if args.json is not None:
                line = {
                    "case": "recovery", "ranks": ranks, "how": how, "nbytes": args.bytes,
                    "from_seen": [times["from_seen"] for times in taken],
                    "from_kill": [times["from_kill"] for times in taken],
                    "idle": idle, "time": time.time(),
                }  # fmt: skip
                with args.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
