# SPDX-License-Identifier: Apache-2.0
"""Stands in for ``os`` in filesystem.py: notes changes, and fails on demand."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

CHANGES = (
    *("mkdir", "open", "pwrite", "fsync", "close", "rename", "link", "unlink", "rmdir"),
    *("ftruncate", "posix_fallocate"),
)


@dataclass
class RecordingOS:
    """Passes calls on to ``os``.

    Attributes:
        fail: Name of the function that fails at its ``nth`` call; None for none.
        code: Error number of that failure.
        calls: (function, path) of every change, in order; descriptors stand for paths.
        fired: Whether the failure happened.
    """

    fail: str | None = None
    nth: int = 1
    code: int = errno.EIO
    calls: list[tuple[str, str]] = field(default_factory=list)
    fired: bool = False
    _open: dict[int, tuple[str, int]] = field(default_factory=dict)
    synced: list[int] = field(default_factory=list)
    _opened: int = 0

    def __getattr__(self, name: str):
        real = getattr(os, name)
        return self._recorded(name, real) if name in CHANGES else real

    def names(self) -> list[tuple[str, str]]:
        """Return the calls with the last part of each path only."""
        return [(name, Path(path).name) for name, path in self.calls]

    def _recorded(self, name: str, real):
        def call(target, *given, **named):
            path = self._open[target][0] if isinstance(target, int) else str(target)
            self.calls.append((name, path))
            if name == "fsync":
                # Numbered by opening: the system gives a closed number out again.
                self.synced.append(self._open[target][1])
            self.nth -= name == self.fail
            if name == self.fail and self.nth == 0:
                self.fired = True
                if name == "close":
                    real(target)
                raise OSError(
                    self.code,
                    os.strerror(self.code),
                    None if isinstance(target, int) else path,
                )
            result = real(target, *given, **named)
            if name == "open":
                self._opened += 1
                self._open[result] = (path, self._opened)
            return result

        return call
