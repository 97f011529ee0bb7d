# SPDX-License-Identifier: Apache-2.0
"""What saves and steps have taken in this run, by the clock of this rank."""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["Costs"]

# As many saves as tell the usual from the odd one, and forget what has changed.
_KEPT = 5

# Of each step, what it adds to the mean; at first the plain mean.
_WEIGHT = 0.1


class Costs:
    """Remembers the last few saves, and how long a step takes. Not collective.

    Not thread-safe. Asked at every step, so it works out its answers when it is told.

    Attributes:
        notes: How much was noted of saves: it changes when what follows does.
        stall_seconds: How long a save stops the training, as a rule; None before the first.
        durable_seconds: How long a save takes at most until it is durable; None before
            the first.
        step_seconds: How long a step takes on average, of late.
        last_step_seconds: How long the last one took.
    """

    def __init__(self) -> None:
        self._stalls: deque[float] = deque(maxlen=_KEPT)
        self._durable: deque[float] = deque(maxlen=_KEPT)
        self._stepped_at: float | None = None
        self._steps = 0
        self.notes = 0
        self.stall_seconds: float | None = None
        self.durable_seconds: float | None = None
        self.step_seconds = 0.0
        self.last_step_seconds = 0.0

    def note_save(self, stall_seconds: float) -> None:
        """Note for how long a save has held up its caller."""
        self._stalls.append(stall_seconds)
        self.notes += 1
        self.stall_seconds = median(self._stalls)

    def note_end_of_save(self, stall_seconds: float) -> None:
        """Note for how long the end of the last save has held up its caller as well."""
        if self._stalls:
            self._stalls[-1] += stall_seconds
            self.notes += 1
            self.stall_seconds = median(self._stalls)

    def note_durable(self, seconds: float) -> None:
        """Note how long a save took from the call until it was known to be durable."""
        self._durable.append(seconds)
        self.notes += 1
        self.durable_seconds = max(self._durable)

    def note_step(self, now: float) -> None:
        """Note the end of a step.

        Args:
            now: Monotonic seconds.
        """
        if self._stepped_at is not None:
            self.last_step_seconds = now - self._stepped_at
            self._steps += 1
            share = max(_WEIGHT, 1 / self._steps)
            self.step_seconds += share * (self.last_step_seconds - self.step_seconds)
        self._stepped_at = now

    def restart_step(self, now: float) -> None:
        """Leave out of the next step what came before it: a save, a restore."""
        if self._stepped_at is not None:
            self._stepped_at = now
