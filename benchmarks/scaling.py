# SPDX-License-Identifier: Apache-2.0
"""What grows with the number of ranks, counted up to 16 and reckoned up to 100,000.

mpirun -n 16 python -m benchmarks scaling measure --json growth.jsonl [--smoke]
python -m benchmarks scaling check growth.jsonl
python -m benchmarks scaling model [growth.jsonl] [--ranks 1000 10000 100000]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks import monitoring
from benchmarks.growth import (
    MEASURED,
    OUTSIDE,
    QUANTITIES,
    Cluster,
    Growth,
    Key,
    explain,
    fit_all,
    grown,
    human_seconds,
    seconds,
    walls,
    words,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["main"]


def check(lines: Sequence[Mapping[str, Any]], console: Console) -> int:
    """Print what was counted and where it grows.

    Returns:
        Exit code: 1 if something grows that nobody knew of, 2 if there is nothing.
    """
    counted = {key: counts for key, counts in grown(lines).items() if any(counts.values())}
    if not counted:
        console.print("nothing was counted")
        return 2
    growths = fit_all(lines)
    console.print(_counts_table(counted, growths))
    if len({ranks for counts in counted.values() for ranks in counts if ranks > 1}) < 2:
        console.print("Fewer than two sizes above 1: they tell nothing of growth.")
        return 0
    console.print(
        "Messages sent count those inside of collectives, too. Twice as many ranks add a "
        "step to a tree; all else is the same for any N, but for:",
        highlight=False,
    )
    growing = [key for key in counted if growths[key].per_rank > 0]
    for known in dict.fromkeys(filter(None, map(explain, growing))):
        console.print(f"- {known.phase}: {known.why}", highlight=False)
    news = [key for key in growing if explain(key) is None]
    for key in news:
        console.print(f"[red]- news: {key.phase}: {words(key.quantity)} of {key.who}[/red]")
    return 1 if news else 0


def _counts_table(
    counted: Mapping[Key, Mapping[int, float]], growths: Mapping[Key, Growth]
) -> Table:
    sizes = sorted({ranks for counts in counted.values() for ranks in counts})
    table = Table(title="counts of the busiest rank, by number of ranks")
    for column in ("phase", "count", "on"):
        table.add_column(column)
    for size in sizes:
        table.add_column(str(size), justify="right")
    table.add_column("each rank adds", justify="right")
    for phase in dict.fromkeys(key.phase for key in counted):
        title = phase
        for key, whose in _rows(counted, phase):
            counts = counted[key]
            table.add_row(
                title,
                words(key.quantity),
                whose,
                *(f"{counts[size]:,.0f}" if size in counts else "" for size in sizes),
                _tell(key, growths[key]),
            )
            title = ""
        table.add_section()
    return table


def _rows(
    counted: Mapping[Key, Mapping[int, float]], phase: str
) -> Iterator[tuple[Key, str]]:
    """Give the keys of a phase; one for root and others where they count alike."""
    for quantity in QUANTITIES:
        root, others = Key(phase, quantity, "root"), Key(phase, quantity, "others")
        apart = [ranks for ranks in counted.get(others, {}) if ranks > 1]
        if apart and all(
            counted.get(root, {}).get(ranks) == counted[others][ranks] for ranks in apart
        ):
            yield root, "every rank"
            continue
        if root in counted:
            yield root, "root"
        if others in counted:
            yield others, "any other"


def _tell(key: Key, growth: Growth) -> str:
    if growth.per_doubling:
        return f"{growth.per_doubling:+,.0f} a doubling"
    if growth.per_rank == 0:
        return "-"
    color = "yellow" if explain(key) else "red"
    return f"[{color}]{growth.per_rank:+,.1f}[/{color}]"


def model(
    growths: Mapping[Key, Growth],
    cluster: Cluster,
    ranks: Sequence[int],
    console: Console,
) -> None:
    """Print how long each phase takes with many ranks, and where the walls stand."""
    table = Table(title="seconds of each phase, reckoned")
    table.add_column("phase")
    for size in ranks:
        table.add_column(f"{size:,} ranks", justify="right")
    for phase in dict.fromkeys(key.phase for key in growths):
        times = [seconds(phase, growths, size, cluster) for size in ranks]
        table.add_row(phase, *map(human_seconds, times))
    console.print(table)
    console.print("assumed: " + ", ".join(f"{k}={v:g}" for k, v in asdict(cluster).items()))
    most = max(ranks)
    found = walls(growths, cluster, most)
    table = Table(
        title=f"walls up to {most:,} ranks",
        caption="* reasoned, not counted",
        show_lines=True,
    )
    table.add_column("from", justify="right")
    for column in ("where", "exceeds", f"at {most:,}", "what removes it"):
        table.add_column(column)
    for wall in found:
        table.add_row(f"{wall.ranks:,}", wall.where, wall.limit, wall.at_most, wall.remedy)
    console.print(table)
    ours = [wall for wall in found if not wall.where.startswith(OUTSIDE)]
    if ours:
        first = ours[0]
        console.print(
            f"The library's first wall: {first.where}, from {first.ranks:,} ranks; "
            f"removed by: {first.remedy}."
        )
    else:
        console.print(f"No wall of the library up to {most:,} ranks.")


def main(argv: Sequence[str] | None = None) -> None:
    """Count, check or reckon.

    Args:
        argv: The arguments behind ``scaling``; None for those of the process.
    """
    arguments = _parse_arguments(argv)
    if arguments.act == "measure":
        _measure(arguments)
        return
    console = Console(width=arguments.width) if arguments.width else Console()
    lines = _read(arguments.lines) if arguments.lines else []
    if arguments.act == "check":
        sys.exit(check(lines, console))
    cluster = Cluster(**{f.name: getattr(arguments, f.name) for f in fields(Cluster)})
    model(fit_all(lines) if lines else MEASURED, cluster, arguments.ranks, console)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling")
    acts = parser.add_subparsers(dest="act", required=True)
    measure = acts.add_parser("measure", help="count, inside mpirun")
    measure.add_argument("--json", type=Path, required=True, help="lines are added to it")
    measure.add_argument("--directory", type=Path, help="where to save; seen by root")
    measure.add_argument(
        "--smoke", action="store_true", help="only that it runs: not all sizes"
    )
    checking = acts.add_parser("check", help="print the counts, and where they grow")
    checking.add_argument("lines", type=Path)
    modelling = acts.add_parser("model", help="reckon with many more ranks")
    modelling.add_argument("lines", type=Path, nargs="?", help="counts; else built-in ones")
    modelling.add_argument(
        "--ranks", type=int, nargs="+", default=[16, 1000, 10_000, 100_000]
    )
    for field in fields(Cluster):
        modelling.add_argument(
            f"--{field.name.replace('_', '-')}", type=float, default=field.default
        )
    for act in (checking, modelling):
        act.add_argument("--width", type=int, help="of the tables, in characters")
    return parser.parse_args(argv)


def _read(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    # A file may hold timings as well: those have no rank.
    return [record for record in found if {"phase", "rank", "ranks"} <= set(record)]


def _measure(arguments: argparse.Namespace) -> None:
    monitoring.enable()
    from mpi4py import MPI

    from benchmarks.counting import count_phases, sizes_up_to

    comm = MPI.COMM_WORLD
    sizes = [comm.size] if arguments.smoke else sizes_up_to(comm.size)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        costs = count_phases(comm, Path(comm.bcast(scratch)), sizes)
        comm.Barrier()
    if comm.rank == 0:
        with arguments.json.open("a") as file:
            file.writelines(f"{json.dumps(asdict(cost))}\n" for cost in costs)
        print(f"{len(costs)} counts of up to {comm.size} ranks are in {arguments.json}")


if __name__ == "__main__":
    main()
