# SPDX-License-Identifier: Apache-2.0
"""Keeps what people want to see of a job: its status now, and the history of a directory.

Two small files beside the generations, written by the root of the job that owns them, read
by the command line. Nothing depends on them: they are not made durable, a failure to write
one is logged once and otherwise ignored, and a reader skips what it does not understand.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.format.layout import HISTORY, STATUS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

EVENTS = ("saved", "kept", "failed", "restored", "fresh", "stopped", "ended")
"""The events of a history."""

_STATUS_BYTES = 4096
"""Always written as a whole: no end of an older, longer status is left behind it."""

_TEXT_MAX = 200
_HISTORY_BYTES_MAX = 64 << 20
_LOOKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEvent:
    """One line of a history.

    Attributes:
        event: One of `EVENTS`.
        time: Seconds since the epoch, by the clock of the root that wrote it.
        job: A name for the run of the job.
        step: The training step.
        ranks: Number of ranks.
        generation: Number of the generation that was saved, kept by the hosts, or restored;
            0 for none.
        saved_ranks: Number of ranks that had saved what was restored.
        nbytes: Bytes written or read.
        reused: Bytes shared with older generations.
        seconds: Phase -> seconds.
        metrics: Metrics of the save.
        reason: Why the job stopped or ended, or why hosts could not keep a save.
        copied_from: Number of the local generation that hosts have copied; 0 for none.
        lag: Steps that the training had gone on by the time a copy was in the directory.
        skipped: Due saves that were left out because this copy was under way.
    """

    event: str
    time: float = 0.0
    job: str = ""
    step: int = 0
    ranks: int = 0
    generation: int = 0
    saved_ranks: int = 0
    nbytes: int = 0
    reused: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    copied_from: int = 0
    lag: int = 0
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields that say something. Not collective. Thread-safe."""
        pairs = ((name, getattr(self, name)) for name in self.__slots__)
        return {name: value for name, value in pairs if value not in (0, "", {})}


class Journal:
    """Writes the status and the history of a directory. Root alone, while it owns it.

    Not collective. One thread at a time.

    Args:
        root: The checkpoint directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._has_failed = False

    def show(self, status: Mapping[str, Any]) -> None:
        """Replace the status of the job; a failure is ignored."""

        def write(path: Path) -> None:
            text = json.dumps(status)
            if len(text) < _STATUS_BYTES:
                data = text.ljust(_STATUS_BYTES - 1) + "\n"
                filesystem.overwrite_start(path, data.encode())

        self._attempt(STATUS, write)

    def add(self, event: HistoryEvent) -> None:
        """Add an event to the history; a failure is ignored."""

        def write(path: Path) -> None:
            filesystem.append(path, (json.dumps(event.to_json()) + "\n").encode())

        self._attempt(HISTORY, write)

    def _attempt(self, name: str, write: Callable[[Path], None]) -> None:
        try:
            write(self._root / name)
        except (OSError, TypeError, ValueError) as error:
            if not self._has_failed:
                self._has_failed = True
                logger.info("%s cannot be written: %s", self._root / name, error)


def read_status(root: Path) -> dict[str, Any]:
    """Return the status that a job has left; empty if there is none. Not collective."""
    for _ in range(_LOOKS):  # it may be in the middle of a write
        try:
            found = json.loads(filesystem.read_start(root / STATUS, _STATUS_BYTES))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            time.sleep(0.01)
            continue
        return found if isinstance(found, dict) else {}
    return {}


def read_history(root: Path) -> list[HistoryEvent]:
    """Return the newest events of a directory, in order. Not collective.

    Skips lines that are incomplete or no events. Empty if there is no history.
    """
    try:
        with filesystem.open_for_reading(root / HISTORY) as (descriptor, nbytes):
            start = max(0, nbytes - _HISTORY_BYTES_MAX)
            data = memoryview(bytearray(min(nbytes, _HISTORY_BYTES_MAX)))
            count = filesystem.read_at(descriptor, data, start)
    except (OSError, ValueError):
        return []
    lines = bytes(data[:count]).splitlines()
    parsed = (_parse(line) for line in lines[bool(start) :])
    return [event for event in parsed if event is not None]


def _parse(line: bytes) -> HistoryEvent | None:
    try:
        found: Any = json.loads(line)
        if found["event"] not in EVENTS:
            return None
        facts: dict[str, Any] = {name: int(found.get(name, 0)) for name in _NUMBERS}
        facts |= {name: str(found.get(name, ""))[:_TEXT_MAX] for name in _TEXTS}
        facts |= {name: _floats(found.get(name, {})) for name in ("seconds", "metrics")}
        return HistoryEvent(event=found["event"], time=float(found["time"]), **facts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


_NUMBERS = (
    *("step", "ranks", "generation", "saved_ranks", "nbytes", "reused"),
    *("copied_from", "lag", "skipped"),
)
_TEXTS = ("job", "reason")


def _floats(found: Any) -> dict[str, float]:  # noqa: ANN401 (JSON)
    return {str(name)[:_TEXT_MAX]: float(value) for name, value in found.items()}
