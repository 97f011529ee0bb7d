# SPDX-License-Identifier: Apache-2.0
"""Watches for requests to stop besides signals: the end of the job, a file, a function."""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.elastic.walltime import WallTime, end_of_job, must_save_now

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.options import StopWhen

logger = logging.getLogger(__name__)

# Checking a shared file system or calling a user's function is too slow for every step.
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _End:
    """An end of the job, by the monotonic clock."""

    at: float
    source: str
    at_first_seconds: float = math.inf


class StopRequests:
    """Watches for requests to stop. Root only. Main thread only.

    Only root's clocks count, so they need not agree with those of other hosts. The end of
    the job is at once converted to a remaining time: setting the clock later has no effect.

    Args:
        when: The requests to watch for.
        root: The directory of the generations.
    """

    def __init__(self, when: StopWhen, root: Path) -> None:
        self._when = when
        self._halt_file = None if when.halt_file is None else root / when.halt_file
        self._asked = when.asked
        self._end: _End | None = None
        self._asked_end: _End | None = None
        self._looked_at = -math.inf

    def read_environment(self) -> None:
        """Find out when the job ends. Root only.

        Raises:
            OptionsError: On the calling rank, if MPI_CKPT_DEADLINE is not a point in time.
        """
        now = time.time()
        wall_time = end_of_job(os.environ, now) if self._when.wall_time else WallTime()
        for text in wall_time.ignored:
            logger.warning("the end of the job is not known: %s", text)
        if wall_time.end is not None:
            left = wall_time.end.time - now
            self._end = _End(time.monotonic() + left, wall_time.end.source, left)
            logger.info("the job ends in %.0f s by %s", left, wall_time.end.source)

    def reason(self, save_seconds: float | None, step_seconds: float) -> str:
        """Return why to stop now; empty if there is no reason. Root only.

        Args:
            save_seconds: How long saves took until they were durable; None if unknown.
            step_seconds: How long a step takes.
        """
        now = time.monotonic()
        if now - self._looked_at >= _PAUSE_SECONDS:
            self._looked_at = now
            if self._halt_file is not None and self._is_there(self._halt_file):
                return f"{self._halt_file} is there; remove it before the next run"
            if self._ask():
                return "StopWhen.asked said so"
        for end in (self._end, self._asked_end):
            if end is not None and must_save_now(
                end.at - now,
                at_first_seconds=end.at_first_seconds,
                save_seconds=save_seconds,
                step_seconds=step_seconds,
                margin_seconds=self._when.margin_seconds,
            ):
                return _explain(end.at - now, end.source, save_seconds)
        return ""

    def left_seconds(self) -> float | None:
        """Return the time until the end of the job; None if unknown. Root only."""
        ends = [end.at for end in (self._end, self._asked_end) if end is not None]
        return min(ends) - time.monotonic() if ends else None

    def _ask(self) -> bool:
        if self._asked is None:
            return False
        try:
            answer = self._asked()
            if answer is None or isinstance(answer, bool):
                return bool(answer)
            if math.isnan(answer):
                raise ValueError("not a number of seconds")
            self._asked_end = _End(time.monotonic() + answer, "StopWhen.asked")
        # The user's function may fail in any way, on root alone; the training goes on.
        except Exception:
            logger.warning(
                "StopWhen.asked has failed: it is not called again", exc_info=True
            )
            self._asked = None
        return False

    def _is_there(self, path: Path) -> bool:
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            logger.warning("%s is not watched any more: %s", path, error)
            self._halt_file = None
            return False
        return True


def _explain(left: float, source: str, save_seconds: float | None) -> str:
    if left <= 0:
        return f"the job should have ended {-left:.0f} s ago by {source}"
    if save_seconds is None:
        return f"the job ends in {left:.0f} s by {source}; how long a save takes is unknown"
    text = f"the job ends in {left:.0f} s by {source}, a save takes {save_seconds:.1f} s"
    return f"{text}: that may be too late" if left < save_seconds else text
