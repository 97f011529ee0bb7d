# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt history``: what happened in a directory, as table or picture."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import GOOD, MISUSED, CommandError, command, directory_argument
from mpi_ckpt.cli.directory_kinds import directory_of_all
from mpi_ckpt.cli.new_file import new_file
from mpi_ckpt.cli.observe.plotting import draw
from mpi_ckpt.cli.observe.record import RunRecord
from mpi_ckpt.cli.plain_text import bytes_text, plural
from mpi_ckpt.cli.tables import Column
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.journal import read_history
from mpi_ckpt.storage.reading.reader import read_manifest

if TYPE_CHECKING:
    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.storage.journal import HistoryEvent

_FORMATS = (".png", ".svg", ".pdf")


@command("history", "Show the saves, restores and metrics of a directory.", dates=True)
@directory_argument()
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw it: a new .png, .svg or .pdf file; needs matplotlib.",
)
@click.option(
    "--last",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="How many events to list; --json has all.",
)
def history(screen: Screen, directory: Path, plot: Path | None, last: int) -> int:
    """Show what happened in DIR: saves, restores, starts and stops, also of removed ones.

    Jobs note each event beside the generations. May run beside a job.
    """
    directory = directory_of_all(directory, "history")
    if plot is not None and plot.suffix not in _FORMATS:
        raise CommandError(
            f"{plot}: a name that ends in {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}",
            code=MISUSED,
            kind="usage",
        )
    record = read_record(directory)
    screen.data(
        {
            "directory": str(directory),
            "events": [event.to_json() for event in record.events],
            "plot": plot and str(plot),
        }
    )
    shown = record.events[-last:]
    names = sorted({name for event in shown for name in event.metrics})
    copies = any(event.copied_from for event in shown)
    screen.table(
        _columns(names, copies=copies),
        [_cells(screen, event, names, copies=copies) for event in shown],
    )
    if len(record.events) > last:
        screen.say(f"and {plural(len(record.events) - last, 'earlier event')}", style="dim")
    if plot is not None:
        data = draw(record, plot.suffix.removeprefix("."))
        with new_file(plot) as descriptor:
            filesystem.write_all(descriptor, data, 0)
        screen.say(f"drawn in {plot}")
    return GOOD


def read_record(directory: Path) -> RunRecord:
    """Read the history of a directory, and what its generations tell.

    Raises:
        ReadError: If the directory cannot be listed.
        CommandError: If nothing is known.
    """
    manifests = []
    for number in recovery.survey(directory).generations:
        with suppress(CheckpointError):
            manifests.append(read_manifest(directory / generation_name(number)))
    record = RunRecord.of(read_history(directory), manifests)
    if not record.events:
        raise CommandError(f"{directory} shows no history", kind="absent")
    return record


def _columns(names: list[str], *, copies: bool) -> list[Column]:
    return [
        Column("when", right=True),
        Column("event"),
        Column("generation", right=True, spare=1),
        Column("step", right=True),
        Column("ranks", right=True, spare=3),
        Column("moved", right=True, spare=5),
        Column("reused", right=True, spare=6),
        Column("seconds", right=True, spare=4),
        *([Column("lag", right=True, spare=4)] if copies else []),
        *([Column("left out", right=True, spare=5)] if copies else []),
        *(Column(name, right=True, foreign=True, spare=2) for name in names),
        Column("job", names=True, spare=7),
    ]


def _cells(
    screen: Screen, event: HistoryEvent, names: list[str], *, copies: bool
) -> list[str]:
    values = [event.metrics.get(name) for name in names]
    ranks = str(event.ranks)
    if event.saved_ranks not in (0, event.ranks):
        ranks = f"{event.saved_ranks} > {event.ranks}"
    word = f"{event.event}: {event.reason}" if event.reason else event.event
    return [
        screen.saved(event.time),
        word,
        str(event.generation or ""),
        str(event.step),
        ranks,
        bytes_text(event.nbytes) if event.nbytes else "",
        bytes_text(event.reused) if event.reused else "",
        f"{event.seconds['total']:.3g}" if "total" in event.seconds else "",
        *(_lag(event) if copies else []),
        *("" if value is None else f"{value:.5g}" for value in values),
        event.job,
    ]


def _lag(event: HistoryEvent) -> list[str]:
    """Return how many steps later a copy came, and how many due saves it left out."""
    return [str(event.lag), str(event.skipped)] if event.copied_from else ["", ""]
