# SPDX-License-Identifier: Apache-2.0
"""Finds the end of the job in its environment. No MPI, no processes, no network.

Variables that schedulers set (facts from their manuals and sources):

- Slurm, sbatch(1), "OUTPUT ENVIRONMENT VARIABLES": SLURM_JOB_END_TIME, a Unix time stamp;
  not in older releases (22.05). With cgroups a process of job 42 is in a control group
  ``job_42``.
- TORQUE: PBS_WALLTIME, the limit in seconds, without a start. Every PBS writes the file
  that PBS_NODEFILE names when it starts the job, on the job's first host.
- PBS Professional, LSF and Flux (flux-environment(7)) give a job no time.

For the latter, and to overrule any other, the job's script sets MPI_CKPT_DEADLINE: a point
in time, not a duration, since a program that starts again in the same job would count a
duration from its own start.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Mapping

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
