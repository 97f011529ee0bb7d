# SPDX-License-Identifier: Apache-2.0
"""``mpirun -n N python -m benchmarks save restore sync --directory DIR``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES
from benchmarks.harness import Figure, measure
from benchmarks.workload import adam_state


def main() -> None:
    """Run the cases and print a table for each on the first rank."""
    arguments = parse_arguments()
    comm = MPI.COMM_WORLD
    state = adam_state(arguments.megabytes)
    nbytes = sum(array.nbytes for array in state.values())
    for case in arguments.cases or CASES:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
            directory = Path(comm.bcast(scratch))
            contenders = CASES[case](comm, directory, state)
            figures = measure(
                comm, case, contenders, nbytes=nbytes, repeats=arguments.repeats
            )
            comm.Barrier()
        if comm.rank == 0:
            show(case, figures)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.writelines(f"{figure.to_json()}\n" for figure in figures)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--megabytes", type=float, default=1200, help="size of the state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the file system to measure")
    parser.add_argument("--json", type=Path, help="append one JSON line a figure")
    parser.add_argument("--smoke", action="store_true", help="tiny: only that it runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.megabytes, arguments.repeats = 1, 1
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(
            f"unknown case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}"
        )
    return arguments


def show(case: str, figures: list[Figure]) -> None:
    """Print the figures of a case, each beside the best ceiling of the same run."""
    first = figures[0]
    best = min(figure.median for figure in figures if figure.ceiling)
    table = Table(
        title=f"{case}: {first.nbytes / 1e6:.0f} MB, {first.ranks} ranks, "
        f"{first.machine['mpi']}, {first.idle_share:.0%} idle before"
    )
    table.add_column("")
    for column in ("median s", "min", "max", "GB/s", "of ceiling"):
        table.add_column(column, justify="right")
    for figure in figures:
        table.add_row(
            figure.contender,
            f"{figure.median:.3f}",
            f"{min(figure.seconds):.3f}",
            f"{max(figure.seconds):.3f}",
            f"{figure.nbytes / figure.median / 1e9:.2f}",
            f"{best / figure.median:.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
