# SPDX-License-Identifier: Apache-2.0
"""Catches text that other code prints and logs, by lines, for the screen to clean."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO


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
