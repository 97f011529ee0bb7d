# SPDX-License-Identifier: Apache-2.0
"""When the next save is due."""

from __future__ import annotations

import time
from datetime import timedelta

__all__ = ["Interval"]


class Interval:
    """Counts steps and time since the last save. Not collective. Not thread-safe.

    Args:
        every: Steps, or time, or None for never.
    """

    def __init__(self, every: int | timedelta | None) -> None:
        self._every = every
        self._saved_at = time.monotonic()

    def restart(self) -> None:
        """Note that a save or restore was just done."""
        self._saved_at = time.monotonic()

    def is_due(self, step: int, *, is_root: bool) -> bool:
        """Tell whether this rank finds a save due at a step.

        Args:
            step: Steps done.
            is_root: Clocks differ between ranks, so for a time only root's counts.
        """
        if isinstance(self._every, timedelta):
            waited = time.monotonic() - self._saved_at
            return is_root and waited >= self._every.total_seconds()
        return self._every is not None and step % self._every == 0
