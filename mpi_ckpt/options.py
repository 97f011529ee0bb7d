# SPDX-License-Identifier: Apache-2.0
"""The options of a manager: one frozen value, the same on every rank."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from mpi_ckpt.errors import OptionsError
from mpi_ckpt.pacing import AutoInterval
from mpi_ckpt.retention import KeepLast, RetentionPolicy
from mpi_ckpt.stopping import StopWhen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ENVIRONMENT", "Options"]

Ranks = Literal["root", "node", "all"]
"""Who does a work: root alone, one rank of every host, or every rank."""

MESSAGE_BYTES_LIMIT = 1 << 30
"""No MPI message is larger: counts are 32 bit up to MPI 3.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a manager behaves. Every rank must give the same.

    Attributes:
        retention: Which generations stay after a save; policies are joined by ``|``.
            Default: the 3 newest.
        interval: When `CheckpointManager.step` saves: every so many steps (an int), every
            so much time (a timedelta, root's clock), as often as is best (``"auto"`` or
            an `AutoInterval`), or never by itself (None, default).
        strict: Whether a state, or a leaf of one, that only the program or only the
            generation has is an error (default), or is left out and reported.
        reuse: Whether leaves that did not change since the newest generation are shared
            with it by hard link instead of written again. Default: yes. Every generation
            stays complete by itself, but one bad sector can then spoil several.
        full_every: Files older than so many generations are not shared any further, so
            that everything is written anew at least that often. Default: 10.
        sync: Whether a save makes the replicas equal first, unless it is told otherwise.
            If not, root's are saved. Default: yes.
        asynchronous: Whether ``save()`` returns once the states are copied, leaving the
            rest to a thread on root. Costs host memory for one copy, on root. Default: no.
        when_pending: What ``save()`` does while an asynchronous save is under way: wait
            for it first (``"wait"``, default), return that one and save nothing
            (``"skip"``), or raise (``"raise"``).
        preemption_signals: Signals that ask for a last save and a stop; noticed by
            ``step()``. Empty: no handler is installed.
        stop: What else asks for that: the end of the job, a file, a function.
        exit_code: What ``manager.exit_code`` becomes when the job was told to stop.
            Default: 143, as a shell reports SIGTERM.
        abort_on_error: Whether an exception that nobody catches on one rank alone ends the
            job, as ``python -m mpi4py`` does; else the ranks wait for one another for ever.
            So does ``sys.exit`` with an error code out of the manager's ``with`` block.
            Default: yes. Without effect in a job of one rank.
        deadline_seconds: How long the ranks wait for one another before every live one
            raises an error that names the absent. Must exceed the longest save.
            Default: 600.
        message_bytes: Largest MPI message and fused bucket in bytes, at most 1 GiB.
            Default: 8 MiB; broadcasts use no larger ones, and shorter between hosts.
        window_bytes: Host memory through which a restore streams, in bytes.
            Default: 64 MiB.
        io: How files are written. ``"auto"`` (default): around the page cache where the
            file system takes that and the file is not small; ``"direct"`` insists;
            ``"buffered"`` never.
        writers: Who writes. ``"root"`` (default): root alone, whose directory nobody else
            need see. ``"node"``: one rank of every host; ``"all"``: every rank. Leaves
            that a sync has proven equal are then split over the writers by bytes, each
            writing a file of its own into the directory, which all must see.
        readers: Who reads in a restore, each a share that is sent to the others:
            ``"root"`` (default), ``"node"`` or ``"all"``, as for ``writers``. More are
            faster where the file system gives one host less than the network does.
        digest_threads: Threads that hash on each rank. Default: 2; more than the cores a
            rank owns is of no use.

    Raises:
        OptionsError: On every rank that makes it, listing all faults at once.
    """

    # These change what happens.
    retention: RetentionPolicy = KeepLast(3)
    interval: int | timedelta | AutoInterval | Literal["auto"] | None = None
    strict: bool = True
    reuse: bool = True
    full_every: int = 10
    sync: bool = True
    asynchronous: bool = False
    when_pending: Literal["wait", "skip", "raise"] = "wait"
    preemption_signals: tuple[signal.Signals, ...] = (
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGINT,
    )
    stop: StopWhen = StopWhen()
    exit_code: int = 143
    abort_on_error: bool = True
    # These change how fast it happens.
    deadline_seconds: float = 600.0
    message_bytes: int = 8 << 20
    window_bytes: int = 64 << 20
    io: Literal["auto", "direct", "buffered"] = "auto"
    writers: Ranks = "root"
    readers: Ranks = "root"
    digest_threads: int = 2

    def __post_init__(self) -> None:
        faults = [text for holds, text in self._requirements() if not holds]
        if faults:
            raise OptionsError(
                "options cannot be used:\n  " + "\n  ".join(faults), problems=faults
            )

    def _requirements(self) -> list[tuple[bool, str]]:
        return [
            (
                isinstance(self.retention, RetentionPolicy),
                f"retention is {self.retention!r}, not a policy such as KeepLast(3)",
            ),
            (
                _is_interval(self.interval),
                f"interval is {self.interval!r}: at least 1 step, a time, or 'auto'",
            ),
            (isinstance(self.stop, StopWhen), f"stop is {self.stop!r}, not a StopWhen"),
            (self.full_every >= 1, f"full_every is {self.full_every}: at least 1"),
            (
                self.when_pending in ("wait", "skip", "raise"),
                f"when_pending is {self.when_pending!r}: wait, skip or raise",
            ),
            (
                0 <= self.exit_code <= 255,
                f"exit_code is {self.exit_code}: 0 to 255",
            ),
            (
                self.deadline_seconds > 0,
                f"deadline_seconds is {self.deadline_seconds}: must be above 0",
            ),
            (
                64 <= self.message_bytes <= MESSAGE_BYTES_LIMIT,
                f"message_bytes is {self.message_bytes}: 64 to {MESSAGE_BYTES_LIMIT}",
            ),
            (
                self.window_bytes >= 1,
                f"window_bytes is {self.window_bytes}: must be above 0",
            ),
            (
                self.io in ("auto", "direct", "buffered"),
                f"io is {self.io!r}: auto, direct or buffered",
            ),
            (
                self.writers in ("root", "node", "all"),
                f"writers is {self.writers!r}: root, node or all",
            ),
            (
                self.readers in ("root", "node", "all"),
                f"readers is {self.readers!r}: root, node or all",
            ),
            (
                self.digest_threads >= 1,
                f"digest_threads is {self.digest_threads}: at least 1",
            ),
        ]

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Options:
        """Make options from ``MPI_CKPT_*`` variables; see `ENVIRONMENT`.

        Not collective. Thread-safe.

        Raises:
            OptionsError: On every rank that calls, if a value cannot be read.
        """
        given: dict[str, Any] = {}
        faults: list[str] = []
        for variable, (name, parse, _) in ENVIRONMENT.items():
            if variable in environ:
                try:
                    given[name] = parse(environ[variable])
                except (ValueError, OverflowError) as error:
                    faults.append(f"{variable}={environ[variable]!r}: {error}")
        if faults:
            raise OptionsError("\n  ".join(faults), problems=faults)
        return cls(**given)

    def describe(self) -> dict[str, str]:
        """Return the fields as text, to compare ranks by. Not collective. Thread-safe."""
        return {field.name: repr(getattr(self, field.name)) for field in fields(self)}


def _is_interval(interval: object) -> bool:
    if isinstance(interval, timedelta):
        return interval > timedelta(0)
    if isinstance(interval, int):
        return interval >= 1
    return interval is None or interval == "auto" or isinstance(interval, AutoInterval)


def _parse_interval(text: str) -> int | timedelta | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.endswith("s"):
        return timedelta(seconds=float(text[:-1]))
    return int(text)


ENVIRONMENT: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "MPI_CKPT_KEEP_LAST": (
        "retention",
        lambda text: KeepLast(int(text)),
        "generations to keep",
    ),
    "MPI_CKPT_INTERVAL": (
        "interval",
        _parse_interval,
        "steps (100) or seconds (600s) between saves, or auto",
    ),
    "MPI_CKPT_REUSE": (
        "reuse",
        lambda text: bool(int(text)),
        "share unchanged leaves",
    ),
    "MPI_CKPT_ABORT_ON_ERROR": (
        "abort_on_error",
        lambda text: bool(int(text)),
        "end the job when one rank fails",
    ),
    "MPI_CKPT_DEADLINE_SECONDS": (
        "deadline_seconds",
        float,
        "how long ranks wait for one another",
    ),
    "MPI_CKPT_MESSAGE_BYTES": ("message_bytes", int, "largest MPI message"),
    "MPI_CKPT_WINDOW_BYTES": ("window_bytes", int, "memory a restore streams through"),
    "MPI_CKPT_IO": ("io", str, "auto, direct or buffered"),
    "MPI_CKPT_WRITERS": ("writers", str, "root, node or all"),
    "MPI_CKPT_READERS": ("readers", str, "root, node or all"),
    "MPI_CKPT_DIGEST_THREADS": ("digest_threads", int, "hashing threads per rank"),
}
"""Variable -> (field, parser, meaning): drives `Options.from_env` and the docs."""
