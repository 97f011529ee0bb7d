# SPDX-License-Identifier: Apache-2.0
"""Takes what others print and log, a line at a time, so that the screen can clean it."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO


class StreamGate(io.TextIOBase):
    """Stands for standard output or standard error.

    Args:
        stream: The one it stands for.
        take: Is given whole lines.
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
        """Return the stream's: what a child process prints does not come through here."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Take text; what is no whole line yet is kept for later."""
        *lines, self._begun = (self._begun + text).split("\n")
        if lines:
            self._take(lines)
        return len(text)

    def finish(self) -> None:
        """Hand on a last line without an end."""
        if self._begun:
            self.write("\n")


class LogGate(logging.Handler):
    """Takes the warnings that the library, or whatever it uses, has logged.

    Args:
        take: Is given the text of each.
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
