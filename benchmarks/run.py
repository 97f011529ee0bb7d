# SPDX-License-Identifier: Apache-2.0
"""Measures cases: ``mpirun -n N python -m benchmarks [run] CASE... --directory DIR``."""

from __future__ import annotations

import argparse
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.harness import Figure, describe_machine, measure
from benchmarks.setting import Arguments, Setting
from benchmarks.table import show
from benchmarks.workload import MODELS, adam_state, model_shapes

__all__ = ["main"]

_SMOKE = {"largest": 64 << 10, "leaves": 200, "parameters": 512, "steps": 10}


def main(argv: list[str]) -> None:
    """Run the cases; root prints a table for each group and keeps the figures."""
    # Here, not above: its import starts MPI, which reading a command line does not need.
    from mpi4py import MPI

    given = parse_arguments(argv)
    comm = MPI.COMM_WORLD
    began = comm.bcast(datetime.now(timezone.utc).isoformat(timespec="seconds"))
    directory = given.directory or Path(tempfile.gettempdir())
    # Only root needs to see the directory.
    machine = comm.bcast(describe_machine(directory) if comm.rank == 0 else None)
    state = adam_state(model_shapes(given.model, given.megabytes))
    for case in given.cases or CASES:
        scratch = None
        if comm.rank == 0:
            scratch = tempfile.TemporaryDirectory(dir=directory, prefix="benchmark-")
        path = Path(comm.bcast(scratch and scratch.name))
        setting = Setting(comm, path, state, case_arguments(given))
        setting.touch()  # the case before may have left the ranks different
        with setting.stack:
            for group in CASES[case](setting):
                figures = measure(
                    comm,
                    case,
                    group,
                    repeats=given.repeats,
                    workload=given.model,
                    run=began,
                    machine=machine,
                    idle_seconds=0.02 if given.smoke else 0.5,
                )
                if comm.rank == 0:
                    keep(figures, given.json)
        comm.Barrier()
        if scratch is not None:
            scratch.cleanup()


def keep(figures: list[Figure], file: Path | None) -> None:
    """Print figures and append them to a file at once: a long run may be cut off."""
    show(figures)
    if file is not None:
        with file.open("a") as lines:
            lines.writelines(f"{figure.to_json()}\n" for figure in figures)


def case_arguments(given: argparse.Namespace) -> Arguments:
    """Return what cases want to know."""
    return Arguments(
        sweep=given.sweep,
        largest=given.largest,
        leaves=given.leaves,
        parameters=given.parameters,
        steps=given.steps,
        smoke=given.smoke,
    )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        epilog="Also: python -m benchmarks targets|plot|scaling --help",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--model", choices=MODELS, default="adam100m", help="whose shapes")
    parser.add_argument(
        "--megabytes", type=float, help="scale the shapes to this size (default: as it is)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the file system to measure")
    parser.add_argument("--json", type=Path, help="append one JSON line a figure")
    parser.add_argument("--sweep", action="store_true", help="sync: sizes from 1 KiB up")
    parser.add_argument(
        "--largest", type=parse_size, default="1GiB", help="where --sweep ends, as 4GiB"
    )
    parser.add_argument("--leaves", type=int, default=20_000, help="small: how many")
    parser.add_argument(
        "--parameters", type=int, default=20_000_000, help="train: of the model"
    )
    parser.add_argument("--steps", type=int, default=30, help="train: in each run")
    parser.add_argument("--smoke", action="store_true", help="tiny: only that it runs")
    given = parser.parse_args(argv)
    if given.smoke:
        given.megabytes, given.repeats = 1, 1
        for name, value in _SMOKE.items():
            setattr(given, name, value)
    unknown = set(given.cases) - set(CASES)
    if unknown:
        parser.error(
            f"unknown case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}"
        )
    return given


def parse_size(text: str) -> int:
    """Read a number of bytes such as 64KiB, 16MiB or 4GiB."""
    for suffix, shift in (("KiB", 10), ("MiB", 20), ("GiB", 30)):
        if text.endswith(suffix):
            return int(text.removesuffix(suffix)) << shift
    return int(text)
