# SPDX-License-Identifier: Apache-2.0
"""Collects what is known of a directory's job, without its lock: read-only, no MPI."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpi_ckpt.cli.generations import lock_holder
from mpi_ckpt.cli.plain_text import ago, bytes_text, plural
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.storage.directory import pins, recovery
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.journal import read_status
from mpi_ckpt.storage.reading.reader import read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mpi_ckpt.storage.format.manifest import Manifest

_FRESH_SECONDS = 30.0
"""A status as young as this shows a job on another host, whose lock is not seen here."""

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class JobView:
    """What can be seen of a directory and its job at one moment.

    Attributes:
        directory: The checkpoint directory.
        now: Seconds since the epoch.
        holder: The process that holds the lock on this host; None for none.
        status: The status that the job has left, of any age.
        manifests: The newest generations, oldest first.
        count: Number of all generations.
        unreadable: Those among the newest whose manifest cannot be read, oldest first.
        pinned: Number -> note of the pinned generations.
        free: Bytes that are free on the file system, and its size; 0 if unknown.
    """

    directory: Path
    now: float
    holder: str | None
    status: Mapping[str, Any]
    manifests: list[Manifest]
    count: int
    unreadable: tuple[int, ...] = ()
    pinned: Mapping[int, str] = field(default_factory=dict)
    free: tuple[int, int] = (0, 0)

    @property
    def is_running(self) -> bool:
        """Whether a job uses the directory, as far as can be seen."""
        if self.status.get("ended") is not None:
            return False
        young = self.now - _number(self.status.get("updated")) < _FRESH_SECONDS
        return self.holder is not None or young

    def facts(self) -> list[tuple[str, str]]:
        """Return names and values for people."""
        return [
            ("job", self._job()),
            ("now", self._doing()),
            ("last save", self._last_save()),
            ("next save", self._next_save()),
            *([("on hosts", kept)] if (kept := self._on_hosts()) else []),
            *([("copy", copy)] if (copy := self._copy()) else []),
            ("free", self._free()),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the view as JSON values."""
        return {
            "directory": str(self.directory),
            "running": self.is_running,
            "lock_holder": self.holder,
            "status": dict(self.status),
            "generations": self.count,
            "newest": self.manifests[-1].generation if self.manifests else None,
            "unreadable": list(self.unreadable),
            "pinned": sorted(self.pinned),
            "bytes_free": self.free[0],
            "facts": dict(self.facts()),
        }

    def _job(self) -> str:
        status = self.status
        if not status:
            text = "none has left a status"
            return f"in use by {self.holder}" if self.holder else text
        ranks = plural(int(_number(status.get("ranks"))), "rank")
        name = f"{status.get('job')} on {status.get('host')}, {ranks}"
        if self.is_running:
            return f"{name}, started {self._ago(status.get('started'))}"
        if status.get("ended") is None:
            return (
                f"{name}: gone without a word, last seen {self._ago(status.get('updated'))}"
            )
        why = status.get("reason") or "finished"
        return f"{name}: ended {self._ago(status['ended'])} ({why})"

    def _doing(self) -> str:
        status = self.status
        if not self.is_running or not status:
            return "-"
        step = f"step {int(_number(status.get('step')))}"
        seen = f"seen {self._ago(status.get('updated'))}"
        if status.get("doing") == "training":
            return f"training, {step}; {seen}"
        spent = max(self.now - _number(status.get("since")), 0.001)
        done, expected = (_number(status.get(f"bytes_{n}")) for n in ("done", "expected"))
        text = f"{status.get('doing')}, {status.get('phase')}, for {spent:.0f} s"
        if not done:
            return f"{text}; {seen}"
        moving = max(_number(status.get("updated")) - _number(status.get("since")), 0.001)
        rate = done / moving
        left = max(0.0, expected - done) / rate
        return (
            f"{text}: {bytes_text(int(done))} of {bytes_text(int(expected))}, "
            f"{bytes_text(int(rate))}/s, {left:.0f} s left; {seen}"
        )

    def _last_save(self) -> str:
        last = self.status.get("last_save")
        if isinstance(last, dict) and self.is_running:
            return self._saved(last)
        if self.manifests:
            newest = self.manifests[-1]
            return (
                f"generation {newest.generation}, step {newest.step}, "
                f"{self._ago(newest.time)}"
            )
        return "none"

    def _next_save(self) -> str:
        due = self.status.get("due")
        if not self.is_running or not isinstance(due, dict) or not due:
            return "-"
        if "step" in due:
            more = int(_number(due["step"])) - int(_number(self.status.get("step")))
            return f"at step {int(_number(due['step']))}, in {plural(more, 'step')}"
        left = _number(due.get("time")) - self.now
        return f"in {left:.0f} s" if left > 0 else "due at the next step"

    def _on_hosts(self) -> str:
        """Return the newest save that hosts keep, and failed ones; empty without any."""
        kept, failures = self.status.get("kept"), self.status.get("local_failures")
        parts = [self._saved(kept)] if isinstance(kept, dict) else []
        if count := int(_number(failures)):
            parts.append(f"{plural(count, 'later save')} failed")
        return "; ".join(parts)

    def _copy(self) -> str:
        """Return how far hosts are in copying a save to the directory; empty if not."""
        copy = self.status.get("copy")
        if not isinstance(copy, dict) or not self.is_running:
            return ""
        step, done, expected, lag, skipped, failed = (
            int(_number(copy.get(name)))
            for name in ("step", "bytes_done", "bytes_expected", "lag", "skipped", "failed")
        )
        spent = _number(self.status.get("updated")) - _number(copy.get("since"))
        text = f"of step {step} to the directory, for {max(spent, 0.0):.0f} s"
        if expected:
            text += f": {bytes_text(done)} of {bytes_text(expected)} of root's host"
        if done and spent > 0:
            rate = done / spent
            text += f", {bytes_text(int(rate))}/s, {(expected - done) / rate:.0f} s left"
        text += f"; {plural(lag, 'step')} behind"
        text += f", {plural(skipped, 'due save')} left out" if skipped else ""
        return f"{text}, failed {plural(failed, 'time')}" if failed else text

    def _saved(self, save: Mapping[str, Any]) -> str:
        return (
            f"generation {save.get('generation')}, step {save.get('step')}, "
            f"{self._ago(save.get('time'))}: "
            f"{bytes_text(int(_number(save.get('bytes'))))} written in "
            f"{_number(save.get('seconds')):.3g} s"
        )

    def _free(self) -> str:
        free, size = self.free
        if not size:
            return "unknown"
        text = f"{bytes_text(free)} of {bytes_text(size)}"
        need = self.manifests[-1].nbytes if self.manifests else 0
        return f"{text}: {free // need:,} more whole generations" if need else text

    def _ago(self, then: Any) -> str:  # noqa: ANN401 (JSON)
        return ago(_number(then), self.now)


def view_job(directory: Path, known: dict[int, Manifest]) -> JobView:
    """Look at a directory.

    Args:
        directory: The checkpoint directory.
        known: Manifests that were read before; those read now are added.

    Raises:
        ReadError: If the directory cannot be listed.
    """
    found = recovery.survey(directory)
    manifests, unreadable = [], []
    for number in reversed(found.generations[:_SHOWN]):
        if number not in known:
            with suppress(CheckpointError):
                known[number] = read_manifest(directory / generation_name(number))
        if number in known:
            manifests.append(known[number])
        elif not recovery.is_gone(directory / generation_name(number)):
            unreadable.append(number)
    return JobView(
        directory=directory,
        now=time.time(),
        holder=lock_holder(directory),
        status=read_status(directory),
        manifests=manifests,
        count=len(found.generations),
        unreadable=tuple(unreadable),
        pinned={n: pins.read_note(directory, n) for n in sorted(found.pinned)},
        free=_free_space(directory),
    )


def _free_space(directory: Path) -> tuple[int, int]:
    try:
        found = os.statvfs(directory)
    except OSError:
        return 0, 0
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _number(value: Any) -> float:  # noqa: ANN401 (JSON)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < 1e18 else 0.0
