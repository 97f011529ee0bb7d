# SPDX-License-Identifier: Apache-2.0
"""Defines the reports of a save, a restore and a sync: plain values, equal on all ranks."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["GenerationInfo", "PhaseClock", "RestoreReport", "SaveReport", "SyncReport"]


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
        level: ``"directory"``, or ``"local"`` for a save to the hosts, whose generation is
            0 if it failed.
        survives: What the save survives: ``"process"`` (the end of all processes),
            ``"host"`` (the loss of a host), ``"power"`` (a power cut of all hosts),
            ``"site"`` (a later job on other hosts).
        local_failures: How many local saves in a row have failed.
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
    level: Literal["directory", "local"] = "directory"
    survives: frozenset[str] = frozenset()
    local_failures: int = 0

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


class PhaseClock:
    """Adds up seconds by phase. Not thread-safe.

    Attributes:
        current: The phase that began last; empty before the first.
    """

    def __init__(self) -> None:
        self.current = ""
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block under a name. Not collective."""
        self.current = name
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def seconds(self) -> dict[str, float]:
        """Return the phases and the total since this clock was made. Not collective."""
        return {**self._seconds, "total": time.perf_counter() - self._start}
