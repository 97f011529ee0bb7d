# SPDX-License-Identifier: Apache-2.0
"""Decides when a save is due, and measures saves and steps by this rank's clock."""

from __future__ import annotations

import logging
import time
from collections import deque
from datetime import timedelta
from statistics import median

from mpi_ckpt.pacing import ASSUMED, AutoInterval, best_interval

logger = logging.getLogger(__name__)

# The first save of a run measures its cost: soon, but not right at the start.
_FIRST_SECONDS = 60.0

# A plan stays until a better plan differs by this much: measurements vary.
_HYSTERESIS = 0.25

# Enough saves to tell outliers from the usual, and few enough to follow changes.
_KEPT = 5

# Weight of each step in the mean; the first steps use the plain mean.
_WEIGHT = 0.1


class Interval:
    """Counts steps and time since the last save. Not collective. Not thread-safe.

    Args:
        every: Steps, or a time, or an `AutoInterval`, or None for never.
        durations: The measured times of saves and steps.

    Attributes:
        failures: How often the job fails, as far as known.
    """

    def __init__(
        self, every: int | timedelta | AutoInterval | None, durations: Durations
    ) -> None:
        self._steps = every if isinstance(every, int) else None
        self._seconds = every.total_seconds() if isinstance(every, timedelta) else None
        self._auto = every if isinstance(every, AutoInterval) else None
        self._durations = durations
        self._planned_after = -1
        self.failures = ASSUMED
        self._saved_at = time.monotonic()

    def restart(self) -> None:
        """Note that a save or restore has just ended."""
        self._saved_at = time.monotonic()

    def is_due_at(self, step: int) -> bool:
        """Return whether a save is due by the number of steps: the same on every rank."""
        return self._steps is not None and step % self._steps == 0

    def is_due_now(self) -> bool:
        """Return whether a save is due by this rank's clock; root's clock decides."""
        if self._auto is not None:
            self._plan(self._auto)
        if self._seconds is None:
            return False
        return time.monotonic() - self._saved_at >= self._seconds

    def next_due(self, step: int) -> dict[str, float]:
        """Return when the next save is due: at a ``step``, at a ``time``, or never.

        Args:
            step: Steps done.
        """
        if self._steps is not None:
            return {"step": step + self._steps - step % self._steps}
        if self._seconds is None:
            return {}
        return {"time": time.time() + self._saved_at + self._seconds - time.monotonic()}

    def _plan(self, auto: AutoInterval) -> None:
        stall = self._durations.stall_seconds
        if stall is None or not self._durations.step_seconds:
            self._seconds = _FIRST_SECONDS
            return
        if self._planned_after == self._durations.notes:
            return
        self._planned_after = self._durations.notes
        seconds = best_interval(
            stall,
            max(self._durations.durable_seconds or 0.0, self._durations.copied_seconds),
            self.failures.mtbf_seconds,
            auto.overhead,
        )
        planned = self._seconds
        if planned is None or planned == _FIRST_SECONDS:
            self._explain(logging.INFO, seconds, stall, auto.overhead)
        elif abs(seconds - planned) <= _HYSTERESIS * planned:
            return
        else:
            self._explain(logging.DEBUG, seconds, stall, auto.overhead)
        self._seconds = seconds

    def _explain(self, level: int, seconds: float, stall: float, overhead: float) -> None:
        logger.log(
            level,
            "saving every %.3g s (about %d steps): a save stops the training for %.3g s, "
            "the job fails every %.3g h (%s), saves may take %g%% of the time",
            seconds,
            max(1, round(seconds / self._durations.step_seconds)),
            stall,
            self.failures.mtbf_seconds / 3600,
            self.failures.source,
            100 * overhead,
        )


class Durations:
    """Remembers the last few saves, and how long a step takes. Not collective.

    Not thread-safe. Every step reads it, so it computes its values when a save is noted.

    Attributes:
        notes: Number of notes about saves; changes whenever the values below may change.
        stall_seconds: How long a save usually stops the training; None before the first.
        durable_seconds: The longest time until a save is durable; None before the first.
        copied_seconds: How long the last copy from the hosts took; 0 before the first.
        step_seconds: Recent average duration of a step.
        last_step_seconds: Duration of the last step.
    """

    def __init__(self) -> None:
        self._stalls: deque[float] = deque(maxlen=_KEPT)
        self._durable: deque[float] = deque(maxlen=_KEPT)
        self._stepped_at: float | None = None
        self._steps = 0
        self.notes = 0
        self.stall_seconds: float | None = None
        self.durable_seconds: float | None = None
        self.copied_seconds = 0.0
        self.step_seconds = 0.0
        self.last_step_seconds = 0.0

    def note_save(self, stall_seconds: float) -> None:
        """Note how long a save has blocked its caller."""
        self._stalls.append(stall_seconds)
        self.notes += 1
        self.stall_seconds = median(self._stalls)

    def note_end_of_save(self, stall_seconds: float) -> None:
        """Add the time that the end of the last save has blocked its caller."""
        if self._stalls:
            self._stalls[-1] += stall_seconds
            self.notes += 1
            self.stall_seconds = median(self._stalls)

    def note_durable(self, seconds: float) -> None:
        """Note how long a save took from the call until it was known to be durable."""
        self._durable.append(seconds)
        self.notes += 1
        self.durable_seconds = max(self._durable)

    def note_copied(self, seconds: float) -> None:
        """Note how long a copy from the hosts to the directory took, behind the training.

        A save does not take as long: its rate is not limited.
        """
        self.notes += 1
        self.copied_seconds = seconds

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
        """Exclude a save or restore from the duration of the next step."""
        if self._stepped_at is not None:
            self._stepped_at = now
