# SPDX-License-Identifier: Apache-2.0
"""Defines the reports of saves, restores and stops: plain values, equal on all ranks.

Also the clock and the counter that they are made from.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

__all__ = [
    *("GenerationInfo", "PhaseClock", "Progress", "RestoreReport", "SaveReport"),
    *("StopReport", "SyncReport", "bytes_text"),
]

_NOTICED_SECONDS = 2.0
"""How often those who watch an operation hear of bytes that have moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sync found and sent.

    Attributes:
        differing: State name -> names of the leaves that were not equal on all ranks;
            ``"(structure)"`` means the contents that are not tensors.
        bytes_hashed: Bytes digested on this rank.
        bytes_sent: Bytes of differing leaves that root sent, or that were averaged.
    """

    differing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bytes_hashed: int = 0
    bytes_sent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """An acknowledged save.

    Attributes:
        generation: Its number.
        path: Its directory, as root sees it.
        step: The training step given at the save.
        size: Number of ranks.
        bytes_written: Bytes written to files, manifest included.
        bytes_reused: Bytes of unchanged leaves, shared with older generations.
        seconds: Phase -> seconds: ``sync`` (this rank); ``stage`` (asynchronous saves),
            ``write`` and ``publish`` (root); ``total`` (until the save was acknowledged).
        pruned: Generations that retention no longer keeps after this save.
        sync: What the sync before the save did.
        kept: Number of generations that retention keeps, this one included.
        metrics: The metrics that root gave to the save.
        level: ``"directory"``, or ``"local"`` for a save to the hosts, whose generation is
            0 if it failed.
        survives: What the save survives: ``"process"`` (the end of all processes),
            ``"host"`` (the loss of a host), ``"power"`` (a power cut of all hosts),
            ``"site"`` (a later job on other hosts).
        local_failures: How many local saves in a row have failed.
        copied_from: Number of the local generation that hosts have copied to the directory;
            0 if the ranks have written it.
        lag: Steps that the training had gone on by the time a copy was in the directory.
        skipped: Due saves to the directory that were left out because a copy was under way.
    """

    generation: int
    path: Path
    step: int
    size: int
    bytes_written: int
    bytes_reused: int
    seconds: Mapping[str, float]
    pruned: tuple[int, ...]
    sync: SyncReport
    kept: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    level: Literal["directory", "local"] = "directory"
    survives: frozenset[str] = frozenset()
    local_failures: int = 0
    copied_from: int = 0
    lag: int = 0
    skipped: int = 0

    def wait(self) -> SaveReport:
        """Return this report: ``save().wait()`` works whether the save blocks or not."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """A finished restore.

    Attributes:
        generation: The generation that was restored; 0 if none was.
        path: Its directory, as root sees it.
        step: The training step it was saved at.
        saved_size: Number of ranks that saved it.
        size: Number of ranks now.
        bytes_read: Bytes read from files, by all ranks that read.
        seconds: Phase -> seconds: ``match``, ``transfer``, ``adopt``, ``total``.
        metrics: The metrics given at the save.
        quarantined: Path -> reason, for every newer generation that failed to verify.
        missing: States of the program that the generation lacks (``strict=False``).
        unexpected: States of the generation that the program lacks (``strict=False``).
        missing_leaves: State -> leaves of the program that the generation lacks; they keep
            their values (``strict=False``).
        unexpected_leaves: State -> leaves of the generation that the program lacks
            (``strict=False``).
        from_memory: Whether the source was a copy in a `Memory`, not a generation; ``path``
            is then the checkpoint directory.
        level: Where it came from: ``"memory"``, ``"local"`` (hosts) or ``"directory"``.
    """

    generation: int
    path: Path
    step: int
    saved_size: int
    size: int
    bytes_read: int
    seconds: Mapping[str, float]
    metrics: Mapping[str, float] = field(default_factory=dict)
    quarantined: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    missing_leaves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unexpected_leaves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    from_memory: bool = False
    level: Literal["memory", "local", "directory"] = "directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReport:
    """A stop that was requested; all is saved.

    Attributes:
        step: The training step.
        reason: Who or what requested it, in words.
        save: The last save.
    """

    step: int
    reason: str
    save: SaveReport


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationInfo:
    """A generation in the directory.

    Attributes:
        generation: Its number.
        path: Its directory, as root sees it.
        step: The training step it was saved at.
        time: Seconds since the epoch, by the clock of the root that saved it.
        size: Number of ranks that saved it.
        nbytes: Bytes of all its files.
        metrics: The metrics given at the save.
        job: A name for the run of the job that saved it.
    """

    generation: int
    path: Path
    step: int
    time: float
    size: int
    nbytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    job: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values. Not collective. Thread-safe."""
        return {**asdict(self), "path": str(self.path)}


class Progress:
    """Counts the bytes that an operation has moved.

    Not collective. One thread at a time counts; any thread may read.

    Args:
        notify: Called at most every two seconds while bytes move, by the thread that counts
            them.

    Attributes:
        expected: Bytes that this rank is to move, as far as known.
        moved: Bytes that it has moved.
    """

    def __init__(self, notify: Callable[[], None] | None = None) -> None:
        self._notify = notify
        self._notified_at = time.monotonic()
        self.expected = 0
        self.moved = 0

    def expect(self, nbytes: int) -> None:
        """Add bytes that are to be moved."""
        self.expected += nbytes

    def count(self, nbytes: int) -> None:
        """Add bytes that were moved."""
        self.moved += nbytes
        if self._notify is not None:
            now = time.monotonic()
            if now - self._notified_at >= _NOTICED_SECONDS:
                self._notified_at = now
                self._notify()


class PhaseClock:
    """Adds up seconds by phase. Not thread-safe.

    Args:
        began: Called when a phase begins.
        ended: Called when one ends, with its name and `time.perf_counter` at its start.
        progress: Counts the bytes that the phases move.

    Attributes:
        current: The phase that began last; empty before the first.
        progress: As given.
    """

    def __init__(
        self,
        began: Callable[[], None] | None = None,
        ended: Callable[[str, float], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.current = ""
        self.progress = progress or Progress()
        self._began, self._ended = began, ended
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block under a name. Not collective."""
        self.current = name
        if self._began is not None:
            self._began()
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + spent
            if self._ended is not None:
                self._ended(name, start)

    def seconds(self) -> dict[str, float]:
        """Return the phases and the total since this clock was made. Not collective."""
        return {**self._seconds, "total": time.perf_counter() - self._start}


def bytes_text(count: int) -> str:
    """Return a number of bytes for users, such as ``12.3 MiB``. Pure."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    units = ["TiB", "GiB", "MiB", "KiB"]
    unit = ""
    while units and value >= 1023.95:
        value, unit = value / 1024, units.pop()
    return f"{value:.1f} {unit}"
