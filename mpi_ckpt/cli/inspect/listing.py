# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt ls``, which lists the generations of a directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from mpi_ckpt.cli.command import GOOD, command, directory_argument, misused, mode_option
from mpi_ckpt.cli.directory_kinds import directory_of_all
from mpi_ckpt.cli.generations import bytes_on_disk, lock_holder, look
from mpi_ckpt.cli.plain_text import bytes_text, plural
from mpi_ckpt.cli.tables import Column
from mpi_ckpt.retention import GenerationSummary, best_first, metric_names
from mpi_ckpt.storage.directory import pins, recovery
from mpi_ckpt.storage.format.layout import QUARANTINE

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.generations import Row
    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.retention import Mode

_SOUND = ("newest", "ok", "gone", "partial", "rolled back")


_SORTS = {
    "generation": lambda manifest: manifest.generation,
    "step": lambda manifest: manifest.step,
    "saved": lambda manifest: manifest.time,
    "size": lambda manifest: manifest.nbytes,
    "ranks": lambda manifest: manifest.size,
}
_BY_BEST = "the best"


@dataclass(frozen=True, slots=True)
class _Marks:
    """What is special about generations: number -> note of its pin; the best, in order."""

    pinned: dict[int, str]
    best: list[int]
    metric: str = ""

    def of(self, row: Row) -> str:
        """Return the marks of a generation, in words."""
        number = _number_of(row)
        marks = [f"best {self.metric}"] if number in self.best[:1] else []
        if number in self.pinned:
            note = self.pinned[number]
            marks.append(f"pinned: {note}" if note else "pinned")
        return ", ".join(marks)

    def to_json(self, row: Row) -> dict[str, Any]:
        """Return the marks of a generation as JSON values."""
        number = _number_of(row)
        return {
            "pinned": number in self.pinned,
            "note": self.pinned.get(number, ""),
            "best": number in self.best[:1],
        }


@command("ls", "List the generations in a directory.", dates=True)
@directory_argument()
@click.option("--best", metavar="METRIC", help="Mark the best by METRIC; give --mode too.")
@mode_option()
@click.option(
    "--sort",
    is_flag=False,
    flag_value=_BY_BEST,
    metavar="[KEY]",
    help="Sort by generation, step, saved, size, ranks or a metric, lowest first; without "
    "KEY the best first.",
)
def list_generations(
    screen: Screen, directory: Path, best: str | None, mode: Mode | None, sort: str | None
) -> int:
    """List the generations in DIR: step, age, size, ranks, state.

    "shared" is what a generation has in common with others by hard link. States: newest
    (what a restore takes), ok, damaged (names, sizes or headers are wrong; verify looks at
    every byte), quarantined, rolled back (set aside by a rollback), partial (being written
    or removed, or left over), gone (pruned by a job while this looked).
    """
    directory = directory_of_all(directory, "ls")
    rows = look(directory)
    holder = lock_holder(directory)
    marks = _marks(directory, rows, best, mode)
    if sort is not None:
        rows = _sorted(rows, sort, marks)
    on_disk = bytes_on_disk(rows)
    screen.data(
        {
            "directory": str(directory),
            "generations": [{**row.to_json(), **marks.to_json(row)} for row in rows],
            "bytes_on_disk": on_disk,
            "lock_holder": holder,
        }
    )
    metrics = sorted({name for r in rows if r.manifest for name in r.manifest.metrics})
    columns = _columns(metrics, asked=(best, sort))
    cells = [_cells(screen, row, metrics) for row in rows]
    if any(marks.of(row) for row in rows):
        columns.append(Column("marks", names=True))
        cells = [[*line, marks.of(row)] for line, row in zip(cells, rows, strict=True)]
    screen.table(columns, cells)
    for row in rows:
        if row.reason and row.state not in _SOUND:
            screen.say(f"{row.name}: {row.reason}", style="red")
    there = [r for r in rows if r.name.startswith("checkpoint-") and r.state != "gone"]
    text = f"{plural(len(there), 'generation')}, {bytes_text(on_disk)} on disk"
    screen.say(text, style="dim")
    if holder is not None:
        screen.say(f"in use by {holder}", style="dim")
    return GOOD


def _number_of(row: Row) -> int:
    published = row.manifest is not None and row.name.startswith("checkpoint-")
    return row.manifest.generation if published and row.manifest else 0


def _marks(
    directory: Path, rows: list[Row], metric: str | None, mode: Mode | None
) -> _Marks:
    pinned = {n: pins.read_note(directory, n) for n in recovery.survey(directory).pinned}
    if metric is None and mode is None:
        return _Marks(pinned, [])
    if metric is None or mode is None:
        raise misused(
            "give both: --best METRIC, and --mode min or --mode max, since only you know "
            "which value is best"
        )
    there = [
        GenerationSummary(row.manifest.generation, row.manifest.step, row.manifest.metrics)
        for row in rows
        if row.manifest is not None and row.state in ("newest", "ok")
    ]
    best = best_first(metric, mode, there)
    if not best:
        raise misused(
            f"--best {metric}: no generation has that metric; there: "
            f"{', '.join(metric_names(there)) or 'none'}",
            "absent",
        )
    return _Marks(pinned, best, metric)


def _sorted(rows: list[Row], sort: str, marks: _Marks) -> list[Row]:
    """Return the rows in another order; those without a value stay last, as they are."""
    if sort == _BY_BEST:
        if not marks.best:
            raise misused(
                "--sort alone puts the best first: give --best METRIC --mode min or max as "
                f"well, or --sort with a metric, or one of {', '.join(_SORTS)}"
            )
        order = {number: place for place, number in enumerate(marks.best)}
        return sorted(rows, key=lambda row: order.get(_number_of(row), len(order)))
    metrics = {name for row in rows if row.manifest for name in row.manifest.metrics}
    if sort not in (*_SORTS, *metrics):
        raise misused(f"--sort {sort}: sort by {', '.join([*_SORTS, *sorted(metrics)])}")

    def key(row: Row) -> tuple[bool, float]:
        manifest = row.manifest
        if manifest is None:
            return True, 0.0
        value = _SORTS[sort](manifest) if sort in _SORTS else manifest.metrics.get(sort)
        return (True, 0.0) if value is None or value != value else (False, value)

    return sorted(rows, key=key)


def _columns(metrics: list[str], asked: tuple[str | None, ...]) -> list[Column]:
    """Return the columns; a metric that was asked for is never left out."""
    return [
        Column("generation", names=True),
        Column("step", right=True, spare=1),
        Column("saved", right=True, spare=3),
        Column("size", right=True, spare=2),
        Column("shared", right=True, spare=6),
        Column("ranks", right=True, spare=5),
        *(
            Column(name, right=True, foreign=True, spare=0 if name in asked else 4)
            for name in metrics
        ),
        Column("state", states=True),
    ]


def _cells(screen: Screen, row: Row, metrics: list[str]) -> list[str]:
    manifest = row.manifest
    number = row.name.removeprefix(f"{QUARANTINE}/")
    if row.state == "rolled back":
        number = f"checkpoint-{number.rpartition('-')[2]}"
    if number.startswith("checkpoint-"):
        number = number.removeprefix("checkpoint-").lstrip("0") or "0"
    if manifest is None:
        said = ["", "", "", *("" for _ in metrics)]
    else:
        values = [manifest.metrics.get(name) for name in metrics]
        shown = ["" if value is None else f"{value:.5g}" for value in values]
        said = [str(manifest.step), screen.saved(manifest.time), str(manifest.size), *shown]
    size, shared = bytes_text(row.nbytes), bytes_text(row.shared)
    return [number, said[0], said[1], size, shared, *said[2:], row.state]
