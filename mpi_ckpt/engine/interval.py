# SPDX-License-Identifier: Apache-2.0
"""When the next save is due."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from mpi_ckpt.pacing import ASSUMED, AutoInterval, best_interval

if TYPE_CHECKING:
    from mpi_ckpt.engine.costs import Costs

__all__ = ["Interval"]

logger = logging.getLogger(__name__)

# The first save of a run tells what one costs: soon, but not of a state just begun.
_FIRST_SECONDS = 60.0

# A plan stays until a better one differs by this much: measurements always differ.
_HYSTERESIS = 0.25


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
        """Tell whether a save is due by the number of steps: the same on every rank."""
        return self._steps is not None and step % self._steps == 0

    def is_due_now(self) -> bool:
        """Tell whether a save is due by this rank's clock; root's counts."""
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
