# SPDX-License-Identifier: Apache-2.0
"""Shows how far a long command is: a bar on a terminal, else a line every 30 s."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mpi_ckpt.cli.plain_text import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BAR_COLUMNS, _BAR_COLUMNS_FEW = 90, 60
_LINE_SECONDS = 30.0


@contextmanager
def progress_bar(
    console: Any,  # noqa: ANN401 (the screen's)
    doing: str,
    nbytes: int,
) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and remaining time; yield a function that adds bytes done."""
    name = TextColumn("{task.description}", markup=False)
    columns: list[ProgressColumn] = [name, TaskProgressColumn()]
    if console.width >= _BAR_COLUMNS_FEW:
        columns = [name, BarColumn(), DownloadColumn(binary_units=True)]
    if console.width >= _BAR_COLUMNS:
        columns += [_RateColumn(), TimeRemainingColumn()]
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        # Text that other code prints meanwhile passes a gate, and is cleaned.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task(doing, total=nbytes)
        yield lambda count: bar.advance(task, count)


class _RateColumn(ProgressColumn):
    """The rate, in the units of all other numbers: rich's own are powers of 1000."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{bytes_text(round(speed))}/s" if speed else "")


class ProgressLines:
    """Prints a line with rate and remaining time every 30 s.

    Args:
        doing: What goes on.
        nbytes: How many bytes there are.
        write: Prints a line.
    """

    def __init__(self, doing: str, nbytes: int, write: Callable[..., None]) -> None:
        self._doing, self._nbytes, self._write = doing, nbytes, write
        self._done = 0
        self._start = self._written_at = time.monotonic()

    def advance(self, count: int) -> None:
        """Add bytes done."""
        self._done += count
        now = time.monotonic()
        if now - self._written_at < _LINE_SECONDS:
            return
        self._written_at = now
        rate = self._done / (now - self._start)
        left = max(0, self._nbytes - self._done) / max(rate, 1.0)
        self._write(
            f"{self._doing}: {bytes_text(self._done)} of {bytes_text(self._nbytes)}, "
            f"{bytes_text(round(rate))}/s, {left:.0f} s left",
            style="",
        )
