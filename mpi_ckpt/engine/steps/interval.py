# SPDX-License-Identifier: Apache-2.0
"""When the next save is due, and what saves and steps have taken by this rank's clock."""

from __future__ import annotations

import logging
import time
from collections import deque
from datetime import timedelta
from statistics import median

from mpi_ckpt.pacing import ASSUMED, AutoInterval, best_interval

logger = logging.getLogger(__name__)

# The first save of a run tells what one costs: soon, but not of a state just begun.
_FIRST_SECONDS = 60.0

# A plan stays until a better one differs by this much: measurements always differ.
_HYSTERESIS = 0.25

# As many saves as tell the usual from the odd one, and forget what has changed.
_KEPT = 5

# Of each step, what it adds to the mean; at first the plain mean.
_WEIGHT = 0.1


class Interval:
    """Counts steps and time since the last save. Not collective. Not thread-safe.

    Args:
        every: Steps, or time, or what to work a time out from, or None for never.
        costs: What saves and steps take.

    Attributes:
        failures: How often the job fails, as far as that is known.
    """

    def __init__(self, every: int | timedelta | AutoInterval | None, costs: Costs) -> None:
        self._steps = every if isinstance(every, int) else None
        self._seconds = every.total_seconds() if isinstance(every, timedelta) else None
        self._auto = every if isinstance(every, AutoInterval) else None
        self._costs = costs
        self._planned_after = -1
        self.failures = ASSUMED
        self._saved_at = time.monotonic()

    def restart(self) -> None:
        """Note that a save or restore was just done."""
        self._saved_at = time.monotonic()

    def is_due_at(self, step: int) -> bool:
        """Return whether a save is due by the number of steps: the same on every rank."""
        return self._steps is not None and step % self._steps == 0

    def is_due_now(self) -> bool:
        """Return whether a save is due by this rank's clock; root's counts."""
        if self._auto is not None:
            self._plan(self._auto)
        if self._seconds is None:
            return False
        return time.monotonic() - self._saved_at >= self._seconds

    def _plan(self, auto: AutoInterval) -> None:
        stall = self._costs.stall_seconds
        if stall is None or not self._costs.step_seconds:
            self._seconds = _FIRST_SECONDS
            return
        if self._planned_after == self._costs.notes:
            return
        self._planned_after = self._costs.notes
        seconds = best_interval(
            stall,
            self._costs.durable_seconds or 0.0,
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
            "failures are %.3g h apart (%s), saves may take %g%% of the time",
            seconds,
            max(1, round(seconds / self._costs.step_seconds)),
            stall,
            self.failures.mtbf_seconds / 3600,
            self.failures.source,
            100 * overhead,
        )


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
