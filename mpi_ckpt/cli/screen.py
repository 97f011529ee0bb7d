# SPDX-License-Identifier: Apache-2.0
"""Prints everything of the command line: tables for users, JSON for programs.

INVARIANT: all text for a terminal is written by `Screen._write`, which cleans it: text of
commands, of click, of Python's warnings, the log and tracebacks, and JSON.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mpi_ckpt.cli.plain_text import age, clean, iso_date, json_text
from mpi_ckpt.cli.progress import ProgressLines, progress_bar
from mpi_ckpt.cli.tables import cut_middle, lay_out, wrap_words
from mpi_ckpt.storage.faults import in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TextIO

    from mpi_ckpt.cli.tables import Column

    Parts = Sequence[tuple[object, str]]


class RedirectedStream(io.TextIOBase):
    """Replaces standard output or standard error.

    Args:
        stream: The replaced stream.
        take: Called with whole lines.
    """

    def __init__(self, stream: TextIO, take: Callable[[list[str]], None]) -> None:
        self._stream, self._take = stream, take
        self._begun = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """See `io.TextIOBase`."""
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """See `io.TextIOBase`."""
        return "backslashreplace"

    def writable(self) -> bool:
        """See `io.TextIOBase`."""
        return True

    def fileno(self) -> int:
        """Return the stream's: output of a child process does not pass through here."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Take text; keep an incomplete line for later."""
        *lines, self._begun = (self._begun + text).split("\n")
        if lines:
            self._take(lines)
        return len(text)

    def finish(self) -> None:
        """Pass on a last line without an end."""
        if self._begun:
            self.write("\n")


class RedirectedLog(logging.Handler):
    """Takes the logged warnings of the library and of the packages that it uses.

    Args:
        take: Called with the text of each.
    """

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._take = take
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            self._take(self.format(record))
        except Exception:
            self.handleError(record)


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
_COLUMNS = 80
_LEAST_CELLS = 14
_LEFT_OUT_NAMED = 8
_NOTE_SPACE = " " * 5
# For a terminal that supports only ASCII.
_IN_ASCII = str.maketrans("─│┌┐└┘…", "-|++++~")


class Screen:
    """The output of a command.

    A context manager: within it, text that other code prints or logs passes through the
    screen too; at its end the JSON object is printed.

    Args:
        as_json: Whether the answer is one JSON object on standard output.

    Attributes:
        as_json: As given.
        iso: Whether to show dates in ISO 8601 instead of ages.
        fault: The unexpected exception, if there was one.
        is_cut_off: Whether the JSON object could not be written.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.iso = False
        self.fault: BaseException | None = None
        self.is_cut_off = False
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)
        self._answer = ""
        self._page: Text | None = None

    def __enter__(self) -> Screen:
        self._before = sys.stdout, sys.stderr
        # Standard output is for the JSON object alone.
        self._redirected = [
            RedirectedStream(console.file, partial(self._write_lines, console))  # type: ignore[arg-type]
            for console in (self._err if self.as_json else self._out, self._err)
        ]
        sys.stdout, sys.stderr = self._redirected
        self._log = RedirectedLog(self.notice)
        logging.root.addHandler(self._log)
        return self

    def __exit__(self, *_: object) -> None:
        logging.root.removeHandler(self._log)
        sys.stdout, sys.stderr = self._before
        for gate in self._redirected:
            gate.finish()
        try:
            if self._answer:
                self._write_lines(self._out, self._answer.split("\n"))
        except OSError as error:  # such as a full disk; a closed pipe ends the program
            self.is_cut_off = True
            self.notice(f"error: {in_words(error)}", "bold red")
        sys.stdout, sys.stderr = map(_able, self._before)

    @property
    def help_width(self) -> int:
        """Width of a help text in cells."""
        return min(_width(self._out) or _COLUMNS, _COLUMNS) - 1

    def say(
        self, text: str = "", style: str = "", *, whole: bool = False, aside: bool = False
    ) -> None:
        """Print a line for users, wrapped if it is too long for the terminal.

        Args:
            text: The line.
            style: Its colour.
            whole: Whether to never break it, since users copy it.
            aside: Whether it is a warning, and goes to standard error.
        """
        if self.as_json:
            return None
        if aside:
            return self.notice(text)
        width = None if whole else _width(self._out)
        return self._write(self._out, _lines(text, style, width))

    def notice(self, text: str, style: str = "yellow") -> None:
        """Print lines on standard error, even if the output is JSON."""
        self._write(self._err, _lines(text, style, _width(self._err)))

    def saved(self, then: float) -> str:
        """Return the time of a save in the requested form."""
        return iso_date(then) if self.iso else age(then)

    def table(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[object]],
        indent: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        """Print a table for users, as much of it as fits.

        Args:
            columns: Its columns.
            rows: Its rows; a cell in a column of states gets its colour.
            indent: Empty cells before it.
            notes: Text on a line below each row, if any.
        """
        if self.as_json or not rows:
            return
        # Some headings are names of metrics.
        columns = [replace(column, heading=clean(column.heading)) for column in columns]
        texts = [[clean(cell) for cell in row] for row in rows]
        width = _width(self._out)
        layout = lay_out(columns, texts, None if width is None else width - indent)
        space, gap = " " * indent, " " * layout.gap
        heading = layout.cells(columns, [column.heading for column in columns])
        lines: list[Parts] = []
        if any(column.heading for column in columns):
            lines.append([(f"{space}{gap.join(heading)}".rstrip(), "bold")])
            lines.append([(space + "─" * layout.width, "")])
        for number, row in enumerate(texts):
            parts = [(space, "")]
            for place, cell in zip(layout.shown, layout.cells(columns, row), strict=True):
                style = _STYLES.get(row[place], "") if columns[place].states else ""
                parts += [(cell, style), (gap, "")]
            lines.append(_without_end(parts))
            if notes and notes[number]:
                lines += _lines(f"{space}{_NOTE_SPACE}{notes[number]}", "", width)
        self._write(self._out, lines)
        if layout.left_out:
            self._say_left_out(layout.left_out, space)

    def has_room(
        self, columns: Sequence[Column], rows: Sequence[Sequence[object]], indent: int = 0
    ) -> bool:
        """Return whether a table fits completely, with nothing cut or left out."""
        width = _width(self._out)
        if width is None:
            return True
        texts = [[clean(cell) for cell in row] for row in rows]
        return lay_out(columns, texts, None).width + indent <= width

    def state(self, state: str, text: str, indent: int = 0) -> None:
        """Print a line for users that begins with a state, in its colour."""
        if not self.as_json:
            head = (f"{' ' * indent}{state:6}", _STYLES.get(state, ""))
            self._write(self._out, [[head, (text, "")]])

    def facts(self, pairs: Sequence[tuple[str, object]]) -> None:
        """Print names and values for users, one pair a line."""
        if self.as_json:
            return
        width = _width(self._out)
        broad = max(len(clean(name)) for name, _ in pairs)
        if width is not None:
            broad = min(broad, max(_LEAST_CELLS, width // 3))
        for name, value in pairs:
            start = f"{cut_middle(clean(name), broad):{broad}}   "
            first, *rest = wrap_words(start + clean(value), width)
            lines: list[Parts] = [[(first[: len(start)], "dim"), (first[len(start) :], "")]]
            lines += [[(f"  {line.strip()}", "")] for line in rest]
            self._write(self._out, lines)

    def data(self, value: dict[str, Any]) -> None:
        """Keep the JSON object for programs, which is printed at the end."""
        if self.as_json:
            self._answer = json_text(value)

    def fail(self, error: BaseException, message: str, *, kind: str, code: int) -> None:
        """Report an error, on standard error, or as the JSON object.

        Args:
            error: The exception.
            message: Its meaning, and what to do.
            kind: A word for programs.
            code: The exit code.
        """
        if self.as_json:
            name = type(error).__name__
            facts = {"message": message, "class": name, "kind": kind, "exit_code": code}
            self.data({"error": facts})
            return
        first, *rest = _lines(f"error: {message}", "", _width(self._err))
        text = str(first[0][0])
        head: Parts = [(text[:7], "bold red"), (text[7:], "")]
        self._write(self._err, [head, *rest])

    def crash(self, error: BaseException, code: int) -> None:
        """Report an unexpected exception, and its place."""
        self.fault = error
        self.notice("".join(traceback.format_exception(error)).rstrip(), style="")
        message = f"{type(error).__name__}: {error}\nthis is a fault of mpi-ckpt: report it"
        self.fail(error, message, kind="unexpected", code=code)

    @contextmanager
    def progress(self, doing: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """Show rate and remaining time; yield a function that adds bytes done.

        By a bar, or a line every 30 s where no terminal is; nothing for programs.
        """
        if self.as_json:
            yield lambda _: None
        elif self._err.is_terminal:
            with progress_bar(self._err, clean(doing), nbytes) as advance:
                yield advance
        else:
            yield ProgressLines(doing, nbytes, self.notice).advance

    @contextmanager
    def live(self) -> Iterator[Callable[[], None]]:
        """Keep a page on the terminal; yield a function that shows what was printed."""
        with Live(console=self._out, screen=True, auto_refresh=False) as page:
            self._page = Text()

            def show() -> None:
                page.update(self._page or Text(), refresh=True)
                self._page = Text()

            try:
                yield show
            finally:
                self._page = None

    @property
    def is_terminal(self) -> bool:
        """Whether a person looks at the output."""
        return self._out.is_terminal and not self.as_json

    def _say_left_out(self, headings: Sequence[str], space: str) -> None:
        named = ", ".join(headings[:_LEFT_OUT_NAMED])
        if len(headings) > _LEFT_OUT_NAMED:
            named += f" and {len(headings) - _LEFT_OUT_NAMED} more"
        many = "columns" if len(headings) > 1 else "column"
        self.say(
            f"{space}{many} left out: {named}; a wider terminal or --json shows them",
            style="dim",
        )

    def _write_lines(self, console: Console, lines: Sequence[str]) -> None:
        self._write(console, [[(line, "")] for line in lines])

    def _write(self, console: Console, lines: Sequence[Parts]) -> None:
        """Print lines of texts with their styles; the only place that prints."""
        encoding = (console.encoding or "").lower()
        table = {} if encoding.startswith("utf") else _IN_ASCII
        text = Text()
        for line in lines:
            for part, style in line:
                text.append(clean(part).translate(table), style)
            text.append("\n")
        if self._page is not None and console is self._out:
            self._page.append_text(text)
        else:
            console.print(text, soft_wrap=True, end="")


def _console(stream: TextIO | None) -> Console:
    if stream is None:  # closed by the shell; a console without a file would take ours
        stream = io.StringIO()
    with suppress(AttributeError, ValueError, io.UnsupportedOperation):
        # A name that the terminal's encoding lacks must not end the program.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
    console = Console(file=stream, highlight=False, emoji=False, markup=False)
    console.width = _width(console) or console.width
    return console


def _able(stream: TextIO) -> TextIO:
    """Return the stream, or one to nowhere if it refuses what it was given.

    That was reported then. Python would try once more at its end, fail, and exit with 120.
    """
    if stream is not None:  # not closed by the shell
        try:
            stream.flush()
        except OSError:
            return io.StringIO()
    return stream


def _width(console: Console) -> int | None:
    """Return the width of a terminal; None if there is none: then nothing is cut."""
    if not console.file.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdecimal() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(console.file.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def _lines(text: str, style: str, width: int | None) -> list[Parts]:
    """Cut text into lines; indent all but the first.

    So a line end in a name never produces what looks like a line of the program.
    """
    first, *rest = text.split("\n")
    shown = wrap_words(clean(first), width)
    for line in rest:
        cleaned = clean(line)
        indented = cleaned if cleaned.startswith("  ") else f"  {cleaned}"
        shown += wrap_words(indented, width)
    return [[(line.rstrip(), style)] for line in shown]


def _without_end(parts: list[tuple[str, str]]) -> Parts:
    """Remove the spaces at the end of a row."""
    while parts and not parts[-1][0].strip():
        parts.pop()
    if parts:
        parts[-1] = (parts[-1][0].rstrip(), parts[-1][1])
    return parts
