# SPDX-License-Identifier: Apache-2.0
"""Watches for requests to stop besides signals: the end of the job, a file, a function."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpi_ckpt.options import StopWhen

logger = logging.getLogger(__name__)


DEADLINE = "MPI_CKPT_DEADLINE"
"""The variable by which a job's script tells when the job ends."""

# A live job is seldom this far beyond its end (OverTimeLimit, a wrong clock); the variables
# of another job are.
_STALE_SECONDS = 600.0

# No job starts before 2001 or ends after 2286; a duration is never in this range.
_EPOCH_RANGE = (1e9, 1e10)

# Saves vary, and the last one may meet the busiest file system.
_SAFETY = 1.5
_UNKNOWN_SAVE_SECONDS = 60.0
_VARIATION = 1.1


@dataclass(frozen=True, slots=True)
class JobEnd:
    """When a job ends.

    Attributes:
        time: Seconds since the epoch.
        source: The variable that gives it.
    """

    time: float
    source: str


@dataclass(frozen=True, slots=True)
class WallTime:
    """The end of the job according to the environment.

    Attributes:
        end: The end, if known.
        ignored: Ignored variables, and why, for the user.
    """

    end: JobEnd | None = None
    ignored: tuple[str, ...] = ()


def parse_deadline(text: str) -> float:
    """Read MPI_CKPT_DEADLINE: seconds since the epoch, or a time of ISO 8601.

    Not collective. Pure, except that a time without an offset is in the local zone.

    Raises:
        OptionsError: On the calling rank, if it is neither.
    """
    fault = ""
    try:
        seconds = float(text)
    except ValueError:
        try:
            given = text.strip()
            # Python 3.10 does not know Z.
            moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", given))
            seconds = moment.astimezone(timezone.utc).timestamp()
        except (ValueError, OverflowError, OSError) as error:
            seconds, fault = math.nan, f" ({error})"
    if not _EPOCH_RANGE[0] <= seconds < _EPOCH_RANGE[1]:
        raise OptionsError(
            f"{DEADLINE}={text!r} is not a point in time: give seconds since the epoch, "
            "say $(( $(date +%s) + 3600 )) in the job's script, or a time such as "
            f"2031-05-01T12:00:00+00:00{fault}"
        )
    return seconds


def end_of_job(
    environ: Mapping[str, str], now: float, cgroup: Path = Path("/proc/self/cgroup")
) -> WallTime:
    """Return the end of the job that this process belongs to.

    Root only. MPI_CKPT_DEADLINE counts even if it has passed. Variables of a scheduler are
    ignored if they cannot be read, or belong to another job.

    Args:
        environ: The environment.
        now: Seconds since the epoch.
        cgroup: The file that names the control groups of this process.

    Raises:
        OptionsError: On the calling rank, if MPI_CKPT_DEADLINE is not a point in time.
    """
    if environ.get(DEADLINE):
        return WallTime(JobEnd(parse_deadline(environ[DEADLINE]), DEADLINE))
    found: list[JobEnd] = []
    ignored: list[str] = []
    for look in (_slurm, _torque):
        try:
            end = look(environ, now, cgroup)
        except ValueError as reason:
            ignored.append(str(reason))
        else:
            if end is not None:
                found.append(end)
    first = min(found, key=lambda end: end.time, default=None)
    return WallTime(first, tuple(ignored))


def must_save_now(
    left_seconds: float,
    *,
    at_first_seconds: float,
    save_seconds: float | None,
    step_seconds: float,
    margin_seconds: float,
) -> bool:
    """Return whether a save that begins after the next step might come too late.

    Pure. A job that had little time from the start trains for half of it, rather than stop
    at its first step: an interrupted save harms no generation.

    Args:
        left_seconds: Time until the end of the job.
        at_first_seconds: The same, when this process first checked.
        save_seconds: How long saves took until they were durable; None if none was made.
        step_seconds: How long a step takes.
        margin_seconds: The user's margin.
    """
    save = _UNKNOWN_SAVE_SECONDS if save_seconds is None else save_seconds
    # A request to stop is noticed one step late, and a step lies between two checks.
    needed = _SAFETY * save + 2 * step_seconds + margin_seconds
    return left_seconds <= min(needed, max(at_first_seconds, 0.0) / 2)


def fits(left_seconds: float | None, save_seconds: float | None) -> bool:
    """Return whether a save that begins now is durable before the job ends.

    Pure. Saves vary: a tenth more than the longest of the last ones must fit.

    Args:
        left_seconds: Time until the end of the job; None if that is not known.
        save_seconds: As for `must_save_now`.
    """
    save = _UNKNOWN_SAVE_SECONDS if save_seconds is None else save_seconds
    return left_seconds is None or left_seconds >= _VARIATION * save


def _slurm(environ: Mapping[str, str], now: float, cgroup: Path) -> JobEnd | None:
    text, name = environ.get("SLURM_JOB_END_TIME"), "SLURM_JOB_END_TIME"
    if not text:
        return None
    job, ours = environ.get("SLURM_JOB_ID", ""), _job_of_cgroup(cgroup)
    if job and ours and job != ours:
        raise ValueError(
            f"{name} is of job {job}, this process belongs to job {ours}: not used"
        )
    return JobEnd(_believable(name, text, now), name)


def _torque(environ: Mapping[str, str], now: float, _cgroup: Path) -> JobEnd | None:
    text, name = environ.get("PBS_WALLTIME"), "PBS_WALLTIME"
    if not text or not environ.get("PBS_JOBID"):
        return None
    try:
        limit = float(text)
        # The file is absent on other hosts than the job's first, and in another job.
        start = Path(environ["PBS_NODEFILE"]).stat().st_mtime
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{name}={text!r} is not used, as the start of the job is not known "
            f"({error!r}): set {DEADLINE} in the job's script"
        ) from error
    return JobEnd(_believable(name, str(start + limit), now), name)


def _believable(name: str, text: str, now: float) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not _EPOCH_RANGE[0] <= seconds < _EPOCH_RANGE[1]:
        raise ValueError(f"{name}={text!r} is not a point in time: not used")
    if seconds < now - _STALE_SECONDS:
        raise ValueError(
            f"{name} is {now - seconds:.0f} s ago: taken for another job's, not used"
        )
    return seconds


def _job_of_cgroup(cgroup: Path) -> str:
    with suppress(OSError, UnicodeError):
        found = re.search(r"/job_(\d+)(?:/|$)", cgroup.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return ""


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
