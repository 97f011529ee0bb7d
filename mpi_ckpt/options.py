# SPDX-License-Identifier: Apache-2.0
"""The options of a manager: one frozen value, the same on every rank."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mpi_ckpt.errors import OptionsError
from mpi_ckpt.pacing import AutoInterval
from mpi_ckpt.retention import KeepLast, RetentionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    *("ENVIRONMENT", "IO", "ROOT", "AbortOn", "Locking", "Options", "Ranks", "StopWhen"),
]

Ranks = Literal["root", "node", "all"]
"""Who does a work: root alone, one rank of every host, or every rank."""

AbortOn: TypeAlias = bool | Literal["communicator"]
"""Whether an error that nobody catches on one rank ends the job, or its communicator."""

_RANKS = ("root", "node", "all")

Locking = Literal["flock", "lease", "none"]
"""How a second job is kept out of the directory."""

ROOT = 0
"""The rank that decides, reads and commits, where none else is named."""

MESSAGE_BYTES_LIMIT = 1 << 30
"""No MPI message is larger: counts are 32 bit up to MPI 3.1."""


def _require(complaint: str, requirements: Sequence[tuple[bool, str]]) -> None:
    faults = [text for holds, text in requirements if not holds]
    if faults:
        raise OptionsError(f"{complaint}:\n  " + "\n  ".join(faults), problems=faults)


def _one_of(name: str, value: object, *allowed: object) -> tuple[bool, str]:
    *first, last = map(str, allowed)
    return value in allowed, f"{name} is {value!r}: {', '.join(first)} or {last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWhen:
    """What asks a job to save and stop, besides signals. Root's view decides.

    Attributes:
        wall_time: Whether the end of the job is looked up in the environment, where its
            scheduler tells it, and the last save comes in time for it. Default: yes.
        margin_seconds: How much earlier than it has to, by the saves measured so far.
            Default: 30.
        halt_file: Name of a file whose presence asks to stop, in the directory of the
            generations unless it is absolute. It is left where it is. Default:
            ``"halt"``; None for none.
        asked: Called on root between steps, at most once a second. What it returns asks
            to stop (True) or not (False or None), or is the number of seconds until the
            job ends. It must not use MPI. Default: none.
        exit_code: What ``manager.exit_code`` becomes when the job was asked to stop, by
            a signal too. Default: 143, as a shell reports SIGTERM.

    Raises:
        OptionsError: On every rank that makes it, if a value cannot be used.
    """

    wall_time: bool = True
    margin_seconds: float = 30.0
    halt_file: str | None = "halt"
    # Functions have no text that is the same on every rank, by which ranks compare.
    asked: Callable[[], bool | float | None] | None = field(default=None, repr=False)
    exit_code: int = 143

    def __post_init__(self) -> None:
        _require(
            "it cannot be told when to stop",
            [
                (
                    self.margin_seconds >= 0,
                    f"margin_seconds is {self.margin_seconds}: at least 0",
                ),
                (
                    self.halt_file != "",
                    "halt_file is empty: a name, or None for no file",
                ),
                (
                    0 <= self.exit_code <= 255,
                    f"exit_code is {self.exit_code}: 0 to 255",
                ),
            ],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class IO:
    """How bytes get to disk, back from it, and between ranks.

    Attributes:
        mode: How files are written. ``"auto"`` (default): around the page cache where the
            file system takes that and the file is not small; ``"direct"`` insists;
            ``"buffered"`` never.
        reuse: Whether leaves that did not change since the newest generation are shared
            with it by hard link instead of written again. Default: yes. Every generation
            stays complete by itself, but one bad sector can then spoil several.
        full_every: Files older than so many generations are not shared any further, so
            that everything is written anew at least that often. Default: 10.
        sync_directories: Whether a file system that cannot fsync directories (CIFS, some
            FUSE) is refused (default). If not, names become durable when it pleases: a
            power cut may take back saves that were acknowledged, though nothing else does.
        readers: Who reads in a restore, each a share that is sent to the others:
            ``"root"`` (default), ``"node"`` or ``"all"``, as for ``Options.writers``.
            More are faster where the file system gives one host less than the network.
        window_bytes: Host memory through which a restore streams, in bytes.
            Default: 64 MiB.
        message_bytes: Largest MPI message and fused bucket in bytes, at most 1 GiB.
            Default: 8 MiB; broadcasts use no larger ones, and shorter between hosts.
        digest_threads: Threads that hash on each rank. Default: 2; more than the cores a
            rank owns is of no use.

    Raises:
        OptionsError: On every rank that makes it, listing all faults at once.
    """

    mode: Literal["auto", "direct", "buffered"] = "auto"
    reuse: bool = True
    full_every: int = 10
    sync_directories: bool = True
    readers: Ranks = "root"
    window_bytes: int = 64 << 20
    message_bytes: int = 8 << 20
    digest_threads: int = 2

    def __post_init__(self) -> None:
        _require(
            "bytes cannot be moved so",
            [
                _one_of("mode", self.mode, "auto", "direct", "buffered"),
                (self.full_every >= 1, f"full_every is {self.full_every}: at least 1"),
                _one_of("readers", self.readers, *_RANKS),
                (
                    self.window_bytes >= 1,
                    f"window_bytes is {self.window_bytes}: must be above 0",
                ),
                (
                    64 <= self.message_bytes <= MESSAGE_BYTES_LIMIT,
                    f"message_bytes is {self.message_bytes}: 64 to {MESSAGE_BYTES_LIMIT}",
                ),
                (
                    self.digest_threads >= 1,
                    f"digest_threads is {self.digest_threads}: at least 1",
                ),
            ],
        )


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
        sync: Whether a save makes the replicas equal first, unless it is told otherwise.
            If not, root's are saved. Default: yes.
        asynchronous: Whether ``save()`` returns once the states are copied, leaving the
            rest to a thread on root. Costs host memory for one copy, on root. Default: no.
            While a save is under way, the next waits for its end first (True), is left
            out and the pending one is returned (``"skip"``), or raises (``"raise"``).
        writers: Who writes. ``"root"`` (default): root alone, whose directory nobody else
            need see. ``"node"``: one rank of every host; ``"all"``: every rank. Leaves
            that a sync has proven equal are then split over the writers by bytes, each
            writing a file of its own into the directory, which all must see.
        preemption_signals: Signals that ask for a last save and a stop; noticed by
            ``step()``. Empty: no handler is installed.
        stop: What else asks for that: the end of the job, a file, a function.
        abort_on_error: Whether an exception that nobody catches on one rank alone ends the
            job, as ``python -m mpi4py`` does; else the ranks wait for one another for ever.
            So does ``sys.exit`` with an error code out of the manager's ``with`` block.
            Default: yes. Without effect in a job of one rank. ``"communicator"``, for
            members of an ensemble that have a manager each: ends those of the manager's
            communicator, and the job when all other members have ended; on every rank.
        deadline_seconds: How long the ranks wait for one another before every live one
            raises an error that names the absent. Must exceed the longest save.
            Default: 600.
        lock: How a second job is kept out of the directory: by flock (default); by a
            ``"lease"`` as well, a file that root rewrites every 5 s, where the file system
            has no flock: a job that was killed is then waited for 30 s; or by you
            (``"none"``): whoever starts last is the owner.
        read_only: Whether the directory is only restored from, without a lock (True); or
            must be writable when it is restored from (False). None (default): if it is
            not, `restore` warns that a save will fail.
        io: How bytes get to disk, back from it, and between ranks.

    Raises:
        OptionsError: On every rank that makes it, listing all faults at once.
    """

    retention: RetentionPolicy = KeepLast(3)
    interval: int | timedelta | AutoInterval | Literal["auto"] | None = None
    strict: bool = True
    sync: bool = True
    asynchronous: bool | Literal["skip", "raise"] = False
    writers: Ranks = "root"
    preemption_signals: tuple[signal.Signals, ...] = (
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGINT,
    )
    stop: StopWhen = StopWhen()
    abort_on_error: AbortOn = True
    deadline_seconds: float = 600.0
    lock: Locking = "flock"
    read_only: bool | None = None
    io: IO = IO()

    def __post_init__(self) -> None:
        _require(
            "options cannot be used",
            [
                (
                    isinstance(self.retention, RetentionPolicy),
                    f"retention is {self.retention!r}, not a policy such as KeepLast(3)",
                ),
                (
                    _is_interval(self.interval),
                    f"interval is {self.interval!r}: at least 1 step, a time, or 'auto'",
                ),
                _one_of("asynchronous", self.asynchronous, True, False, "skip", "raise"),
                _one_of("writers", self.writers, *_RANKS),
                _one_of("abort_on_error", self.abort_on_error, True, False, "communicator"),
                (isinstance(self.stop, StopWhen), f"stop is {self.stop!r}, not a StopWhen"),
                (
                    self.deadline_seconds > 0,
                    f"deadline_seconds is {self.deadline_seconds}: must be above 0",
                ),
                _one_of("lock", self.lock, "flock", "lease", "none"),
                _one_of("read_only", self.read_only, None, True, False),
                (
                    not (self.read_only and self.interval is not None),
                    f"interval is {self.interval!r}, and read_only=True: nothing is saved",
                ),
                (isinstance(self.io, IO), f"io is {self.io!r}, not an IO"),
            ],
        )

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
        io = {
            name.removeprefix("io."): given.pop(name)
            for name in list(given)
            if name.startswith("io.")
        }
        return cls(**given, io=IO(**io))

    def describe(self) -> dict[str, str]:
        """Return the fields as text, to compare ranks by. Not collective. Thread-safe."""
        return {one.name: repr(getattr(self, one.name)) for one in fields(self)}


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


def _parse_flag(text: str) -> bool:
    return bool(int(text))


def _parse_abort(text: str) -> AbortOn:
    return "communicator" if text == "communicator" else _parse_flag(text)


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
    "MPI_CKPT_WRITERS": ("writers", str, "root, node or all"),
    "MPI_CKPT_ABORT_ON_ERROR": (
        "abort_on_error",
        _parse_abort,
        "end the job when one rank fails, or its communicator",
    ),
    "MPI_CKPT_DEADLINE_SECONDS": (
        "deadline_seconds",
        float,
        "how long ranks wait for one another",
    ),
    "MPI_CKPT_LOCK": ("lock", str, "flock, lease or none"),
    "MPI_CKPT_READ_ONLY": ("read_only", _parse_flag, "restore only, or fail if unwritable"),
    "MPI_CKPT_SYNC_DIRECTORIES": ("io.sync_directories", _parse_flag, "insist on it"),
    "MPI_CKPT_IO": ("io.mode", str, "auto, direct or buffered"),
    "MPI_CKPT_REUSE": ("io.reuse", _parse_flag, "share unchanged leaves"),
    "MPI_CKPT_READERS": ("io.readers", str, "root, node or all"),
    "MPI_CKPT_WINDOW_BYTES": ("io.window_bytes", int, "memory of a restore"),
    "MPI_CKPT_MESSAGE_BYTES": ("io.message_bytes", int, "largest MPI message"),
    "MPI_CKPT_DIGEST_THREADS": ("io.digest_threads", int, "hashing threads per rank"),
}
"""Variable -> (field, parser, meaning): drives `Options.from_env` and the docs."""
