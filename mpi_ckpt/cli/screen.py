# SPDX-License-Identifier: Apache-2.0
"""Everything that is printed goes through here: tables for people, JSON for programs.

Names found in files are somebody else's text: they are shown without what a terminal
would obey, and never as markup.
"""

from __future__ import annotations

import json
import os
import time
import unicodedata
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Screen", "age", "bytes_text", "clean", "plural"]

_STYLES = {
    "newest": "bold green",
    "finished": "bold green",
    "preempted": "cyan",
    "failed": "red",
    "lost": "red",
    "unrecorded": "red",
    "hung": "bold red",
    "ok": "green",
    "good": "bold green",
    "equal": "dim",
    "note": "yellow",
    "partial": "cyan",
    "gone": "dim",
    "changed": "yellow",
    "added": "green",
    "removed": "red",
    "quarantined": "magenta",
    "rolled back": "magenta",
    "wrong": "bold red",
    "damaged": "bold red",
    "unreadable": "bold red",
    "unsupported": "bold red",
}
# Wide enough for any table where nobody looks: a pipe should not cut names off.
_PIPE_COLUMNS = 400


def clean(text: object) -> str:
    """Return text with all that a terminal would obey written out instead."""
    return "".join(
        character
        if unicodedata.category(character)[0] != "C"
        and unicodedata.category(character) not in ("Zl", "Zp")
        else character.encode("unicode_escape", "replace").decode()
        for character in str(text)
    )


def bytes_text(count: int) -> str:
    """Return a number of bytes for people, such as ``12.3 MiB``."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    units = ["TiB", "GiB", "MiB", "KiB"]
    unit = ""
    while units and value >= 1023.95:
        value, unit = value / 1024, units.pop()
    return f"{value:.1f} {unit}"


def age(then: float, now: float | None = None) -> str:
    """Return how long ago something was, such as ``3 min``."""
    seconds = (time.time() if now is None else now) - then
    if seconds < 0:
        return "in future"
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as ``1 leaf``."""
    many = noun[:-1] + "ves" if noun.endswith("leaf") else noun + "s"
    return f"{count} {noun if count == 1 else many}"


class Screen:
    """Where a command says what it found.

    Args:
        as_json: Whether the answer is one JSON object on standard output.

    Attributes:
        as_json: Likewise.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._out = _console(stderr=False)
        self._err = _console(stderr=True)

    def say(self, text: str = "", style: str = "") -> None:
        """Print a line for people."""
        if not self.as_json:
            self._out.print(Text(clean(text), style=style), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line for people on standard error."""
        if not self.as_json:
            self._err.print(Text(clean(text), style="yellow"), soft_wrap=True)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], indent: int = 0
    ) -> None:
        """Print a table for people.

        Args:
            columns: Headings; one that starts with ``>`` is that of numbers. None is
                shown where all are empty.
            rows: A cell that is a state gets its colour.
            indent: Columns left free before it.
        """
        if self.as_json or not rows:
            return
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold"
        )
        for heading in columns:
            table.add_column(
                heading.lstrip(">"),
                justify="right" if heading.startswith(">") else "left",
                overflow="fold",
                no_wrap=heading.startswith(">"),
            )
        for row in rows:
            cells = [clean(cell) for cell in row]
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
        table.show_header = any(columns)
        self._out.print(Padding(table, (0, 0, 0, indent), expand=False))

    def facts(self, pairs: Sequence[tuple[str, object]]) -> None:
        """Print names and values for people, one pair a line."""
        if self.as_json:
            return
        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in pairs:
            grid.add_row(Text(name, style="dim"), Text(clean(value)))
        self._out.print(grid)

    def data(self, value: dict[str, Any]) -> None:
        """Print the JSON object for programs."""
        if self.as_json:
            click.echo(json.dumps(value, indent=2, allow_nan=False))

    def fail(self, kind: str, message: str) -> None:
        """Say what went wrong, on standard error, or as the JSON object."""
        if self.as_json:
            self.data({"error": message, "kind": kind})
            return
        text = Text("error: ", style="bold red")
        lines = [clean(line) for line in message.splitlines()]
        text.append("\n".join(lines), style="not bold default")
        self._err.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, doing: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """Show a bar with rate and time left; gives a function that takes bytes done.

        Nothing is shown for programs, nor where standard error is no terminal.
        """
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._err,
            transient=True,
            disable=self.as_json or not self._err.is_terminal,
        )
        with bar:
            task = bar.add_task(clean(doing), total=nbytes)
            yield lambda count: bar.advance(task, count)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_COLUMNS
    return console
