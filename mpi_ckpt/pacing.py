# SPDX-License-Identifier: Apache-2.0
"""Computes how often to save from the cost of a save and the failure rate. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    *("ASSUMED", "AutoInterval", "Failures", "best_interval", "count_failures"),
    *("interval_advice", "is_interval", "parse_interval"),
]

# Fewer ends of runs say almost nothing about the mean time between them.
_ENOUGH_FAILURES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoInterval:
    """An interval between saves that is computed from their cost.

    Attributes:
        mtbf: Mean time between failures of the whole job. None (default): estimated from
            the generations in the directory, else a day.
        overhead: Share of the time that saves may take from the training at most,
            whatever the failures. Default: 2%.

    Raises:
        OptionsError: On every rank that makes it, if a value cannot be used.
    """

    mtbf: timedelta | None = None
    overhead: float = 0.02

    def __post_init__(self) -> None:
        faults = []
        if self.mtbf is not None and self.mtbf <= timedelta(0):
            faults.append(f"mtbf is {self.mtbf}: a time above 0")
        if not 0 < self.overhead < 1:
            faults.append(f"overhead is {self.overhead}: above 0 and below 1")
        if faults:
            raise OptionsError(
                "an interval cannot be worked out:\n  " + "\n  ".join(faults),
                problems=faults,
            )


@dataclass(frozen=True, slots=True)
class Failures:
    """How often a job fails.

    Attributes:
        mtbf_seconds: Mean time between two failures.
        source: Where the number comes from, in a word or two.
    """

    mtbf_seconds: float
    source: str


ASSUMED = Failures(86400.0, "assumed")
"""What is taken for true until something is known."""


def is_interval(interval: object) -> bool:
    """Return whether a value is an interval between saves. Pure."""
    if isinstance(interval, timedelta):
        return interval > timedelta(0)
    if isinstance(interval, int):
        return interval >= 1 and interval is not True
    return interval is None or interval == "auto" or isinstance(interval, AutoInterval)


def interval_advice(interval: object) -> str:
    """Return in words what an interval may be, in place of one that is none. Pure."""
    text = (
        f"interval is {interval!r}: a number of steps (500), a time "
        "(timedelta(minutes=10)), 'auto' or None"
    )
    if isinstance(interval, str):
        return f"{text}; texts such as '600s' are read from MPI_CKPT_INTERVAL alone"
    return text


def parse_interval(text: str) -> int | timedelta | Literal["auto"]:
    """Return the interval in a text: steps (100), seconds (600s) or auto. Pure.

    Raises:
        ValueError: On the calling rank, if it is none.
    """
    if text == "auto":
        return "auto"
    try:
        if text.endswith("s"):
            return timedelta(seconds=float(text[:-1]))
        return int(text)
    except ValueError:
        raise ValueError("steps (500), seconds (600s) or auto") from None


def count_failures(saves: Sequence[tuple[str, float]], job: str, now: float) -> Failures:
    """Estimate from the generations in the directory how often the job fails.

    Pure. Each generation names the job that wrote it. Any job but the present one has
    ended, for a reason that no file records: its end counts as a failure, which can only
    make saves more frequent. Generations that retention removed cannot be counted, so the
    estimate misses failures.

    Args:
        saves: Job and time (seconds since the epoch) of every generation, oldest first.
        job: The present job.
        now: Seconds since the epoch.

    Returns:
        The time since the oldest generation, divided by the number of jobs that have ended
        since; a day, if fewer than three have.
    """
    ended = len({name for name, _ in saves} - {job})
    span = now - saves[0][1] if saves else 0.0
    if ended < _ENOUGH_FAILURES or span <= 0:
        return ASSUMED
    return Failures(span / ended, f"{ended} jobs have ended since the oldest generation")


def best_interval(
    stall_seconds: float,
    durable_seconds: float,
    mtbf_seconds: float,
    overhead: float,
) -> float:
    """Return the seconds of training between two saves that lose the least time.

    Pure. J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
    restart dumps", Future Generation Computer Systems 22 (2006), which refines J. W.
    Young's sqrt(2 C M) (Communications of the ACM 17, 1974). ``C``, the cost of a save, is
    the time that it stops the training. The result has two lower bounds: one from the
    overhead, and the time until a save is durable, since the next save would have to wait
    for it.

    Args:
        stall_seconds: How long a save stops the training.
        durable_seconds: How long it takes until it is durable.
        mtbf_seconds: Mean time between failures.
        overhead: Share of the time that saves may take at most, above 0 and below 1.
    """
    cost, mean = stall_seconds, mtbf_seconds
    if cost < 2 * mean:
        ratio = cost / (2 * mean)
        best = math.sqrt(2 * cost * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost
    else:
        best = mean
    affordable = cost * (1 - overhead) / overhead
    return max(best, affordable, durable_seconds)
