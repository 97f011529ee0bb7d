# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt report``: one page for a browser about a directory."""

from __future__ import annotations

import time
from collections import Counter
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import GOOD, CommandError, command, directory_argument
from mpi_ckpt.cli.directory_kinds import directory_of_all
from mpi_ckpt.cli.generations import look
from mpi_ckpt.cli.new_file import new_file
from mpi_ckpt.cli.observe.history_plot import read_record
from mpi_ckpt.cli.observe.plotting import draw
from mpi_ckpt.cli.plain_text import bytes_text, clean, iso_date, plural
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import pins, recovery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.cli.generations import Row
    from mpi_ckpt.cli.observe.record import RunRecord
    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.storage.journal import HistoryEvent

_EVENTS_MAX = 1000
_ACTS = {
    "saved": "saves",
    "kept": "saves on the hosts",
    "copied": "copies from the hosts",
    "restored": "restores",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; color: #1d2733; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e3e8ee;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: #5b6b7c; font-weight: 600; }
.bar { display: inline-block; height: .7rem; background: #2f6fb2; border-radius: 2px; }
.track { display: inline-block; width: 8rem; text-align: left; }
.note { color: #5b6b7c; } svg { max-width: 100%; height: auto; }
"""


@command("report", "Write a page for the browser about a directory.")
@directory_argument()
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="The file, which must not exist.",
)
def report(screen: Screen, directory: Path, output: Path) -> int:
    """Write one HTML file about DIR: history, sizes, timings, and where the time went.

    It needs nothing else and loads nothing. With matplotlib it has pictures. May run beside
    a job.
    """
    directory = directory_of_all(directory, "report")
    record, rows = read_record(directory), look(directory)
    pinned = {n: pins.read_note(directory, n) for n in recovery.survey(directory).pinned}
    try:
        picture = draw(record, "svg").decode()
        picture = picture[picture.index("<svg") :]
    except CommandError as error:
        picture = f'<p class="note">{escape(str(error))}</p>'
    page = make_page(directory, record, rows, pinned, picture)
    data = page.encode("utf-8", "backslashreplace")
    with new_file(output) as descriptor:
        filesystem.write_all(descriptor, data, 0)
    screen.data({"output": str(output), "bytes": len(data), "events": len(record.events)})
    screen.say(f"{output}: {plural(len(record.events), 'event')}, {bytes_text(len(data))}")
    return GOOD


def make_page(
    directory: Path,
    record: RunRecord,
    rows: Sequence[Row],
    pinned: dict[int, str],
    picture: str,
) -> str:
    """Return the page. Pure, but for the time of day.

    Args:
        directory: The checkpoint directory.
        record: Its history.
        rows: Its generations and what else there is.
        pinned: Number -> note of the pinned generations.
        picture: An element with pictures of the history.
    """
    name = escape(clean(directory.absolute()))
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>Checkpoints in {name}</h1>",
        f'<p class="note">written {iso_date(time.time())} by mpi-ckpt report</p>',
        *("<h2>In short</h2>", _table(["what", "value"], _summary(record, rows))),
        *("<h2>History</h2>", f'<div class="scroll">{picture}</div>'),
        "<h2>Where the time went</h2>",
        _times(record),
        *("<h2>Generations</h2>", _generations(rows, pinned)),
        *("<h2>Events</h2>", _events(record)),
        "</body></html>",
    ]
    return "\n".join(parts)


def _summary(record: RunRecord, rows: Sequence[Row]) -> list[list[object]]:
    saves = record.saves
    on_disk = sum(size for _, _, size in frozenset().union(*(r.inodes for r in rows)))
    sizes = sorted({event.ranks for event in record.events if event.ranks})
    written = sum(event.nbytes for event in saves)
    return [
        ["runs", len(record.jobs)],
        ["ranks", ", ".join(map(str, sizes))],
        ["saves", len(saves)],
        *_on_hosts(record),
        ["restores", sum(event.event == "restored" for event in record.events)],
        ["last step saved", saves[-1].step if saves else "none"],
        ["written in all", bytes_text(written)],
        ["shared with older generations", bytes_text(sum(e.reused for e in saves))],
        ["on disk now", bytes_text(on_disk)],
    ]


def _on_hosts(record: RunRecord) -> list[list[object]]:
    """Return rows about the saves on hosts and their copies; none without any."""
    counts = Counter(event.event for event in record.events)
    copies = [event for event in record.saves if event.copied_from]
    rows: list[list[object]] = []
    if counts["kept"] or counts["failed"]:
        rows.append(["saves on the hosts", counts["kept"]])
        rows.append(["failed saves on the hosts", counts["failed"]])
    if copies:
        rows.append(["saves copied from the hosts", len(copies)])
        rows.append(["most steps that a copy came later", max(e.lag for e in copies)])
        rows.append(["due saves left out", sum(e.skipped for e in copies)])
    return rows


def _times(record: RunRecord) -> str:
    span = record.span_seconds()
    lines: list[list[object]] = []
    for event, phases in record.seconds_by_phase().items():
        for phase, spent in phases.items():
            lines.append(
                [f"{_ACTS[event]}, {phase}", f"{spent:.3g} s", _share(spent, span)]
            )
    lines.append(["between runs", f"{record.lost_seconds():.3g} s", ""])
    lines.append(["runs, from first to last event", f"{span:.3g} s", ""])
    note = (
        '<p class="note">Phases of root. What a save does behind the training does not '
        "stop it.</p>"
    )
    return _table(["what", "seconds", "share of the runs"], lines, raw=2) + note


def _share(spent: float, span: float) -> str:
    if span <= 0:
        return ""
    share = min(1.0, spent / span)
    bar = f'<span class="bar" style="width:{8 * share:.2f}rem"></span>'
    return f'{100 * share:.2g} % <span class="track">{bar}</span>'


def _generations(rows: Sequence[Row], pinned: dict[int, str]) -> str:
    lines: list[list[object]] = []
    names = sorted({name for r in rows if r.manifest for name in r.manifest.metrics})
    for row in rows:
        found = row.manifest
        mark = ""
        if found is not None and found.generation in pinned:
            mark = f"pinned {pinned[found.generation]}".strip()
        metrics = dict(found.metrics) if found else {}
        lines.append(
            [
                row.name,
                *((found.step, iso_date(found.time), found.size) if found else ("",) * 3),
                *(bytes_text(row.nbytes), bytes_text(row.shared)),
                *(_value(metrics.get(name)) for name in names),
                *(row.state, mark),
            ]
        )
    head = ["name", "step", "saved", "ranks", "size", "shared", *names, "state", ""]
    return _table(head, lines)


def _events(record: RunRecord) -> str:
    lines = [_event(event) for event in reversed(record.events[-_EVENTS_MAX:])]
    head = [
        "when",
        "event",
        "generation",
        "step",
        "ranks",
        "moved",
        "seconds",
        "lag",
        "run",
    ]
    more = len(record.events) - _EVENTS_MAX
    note = f'<p class="note">and {more} earlier ones</p>' if more > 0 else ""
    return _table(head, lines) + note


def _event(event: HistoryEvent) -> list[object]:
    total = event.seconds.get("total")
    return [
        iso_date(event.time),
        f"{event.event}: {event.reason}" if event.reason else event.event,
        event.generation or "",
        event.step,
        event.ranks,
        bytes_text(event.nbytes) if event.nbytes else "",
        _value(total),
        event.lag if event.copied_from else "",
        event.job,
    ]


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], lines: Sequence[Sequence[object]], raw: int = -1) -> str:
    """Return a table; all text is escaped but for one column, which is ours."""
    heads = "".join(f"<th>{escape(clean(cell))}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{cell if place == raw else escape(clean(cell))}</td>"
            for place, cell in enumerate(line)
        )
        + "</tr>\n"
        for line in lines
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'
