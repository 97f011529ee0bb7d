# SPDX-License-Identifier: Apache-2.0
"""Defines the options of a manager: one frozen value, the same on every rank."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mpi_ckpt.errors import OptionsError
from mpi_ckpt.hooks import Hooks
from mpi_ckpt.pacing import AutoInterval, interval_advice, is_interval, parse_interval
from mpi_ckpt.retention import KeepLast, RetentionPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import timedelta

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


def _at_least(
    name: str, value: float, least: int, most: int | None = None, *, kind: type = Integral
) -> tuple[bool, str]:
    holds = isinstance(value, kind) and least <= value and (most is None or value <= most)
    limits = f"at least {least}" if most is None else f"{least} to {most}"
    return holds, f"{name} is {value!r}: {limits}"


def _above_0(name: str, value: float, kind: type = Real) -> tuple[bool, str]:
    return isinstance(value, kind) and value > 0, f"{name} is {value!r}: must be above 0"


def _signals(name: str, value: object) -> tuple[bool, str]:
    given = value if isinstance(value, tuple | list) else (None,)
    fatal = {signal.SIGKILL, signal.SIGSTOP}  # no program can answer these
    holds = all(isinstance(one, int) and one not in fatal for one in given)
    return holds, f"{name} is {value!r}: a tuple of signals, such as (signal.SIGTERM,)"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWhen:
    """The requests to save and stop, besides signals. Root's view decides.

    Attributes:
        wall_time: Whether to read the end of the job from the environment, where its
            scheduler puts it, and to make the last save in time for it. Default: yes.
        margin_seconds: How much earlier than necessary, by the saves measured so far.
            Default: 30.
        halt_file: Name of a file whose presence asks to stop, in the directory of the
            generations unless it is absolute. The file is not removed. Default: ``"halt"``;
            None for none.
        asked: Function that root calls between steps, at most once a second. It returns
            True to stop, False or None to go on, or the number of seconds until the job
            ends. It must not use MPI. Default: none.
        exit_code: Value of ``manager.exit_code`` after a request to stop, also by a signal.
            Default: 143, as a shell reports SIGTERM.

    Raises:
        OptionsError: On every rank that makes it, if a value cannot be used.
    """

    wall_time: bool = True
    margin_seconds: float = 30.0
    halt_file: str | None = "halt"
    # Ranks compare options as text, and the text of a function differs between ranks.
    asked: Callable[[], bool | float | None] | None = field(default=None, repr=False)
    exit_code: int = 143

    def __post_init__(self) -> None:
        _require(
            "these values of StopWhen cannot be used",
            [
                _at_least("margin_seconds", self.margin_seconds, 0, kind=Real),
                (
                    self.halt_file != "",
                    "halt_file is empty: a name, or None for no file",
                ),
                _at_least("exit_code", self.exit_code, 0, 255),
            ],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class IO:
    """How bytes move to disk, from disk, and between ranks.

    Attributes:
        mode: How files are written. ``"auto"`` (default) bypasses the page cache where the
            file system supports that and the file is not small; ``"direct"`` fails where it
            cannot; ``"buffered"`` never.
        reuse: Whether a save shares leaves that did not change since the newest generation
            by hard link instead of writing them again. Default: yes. Every generation stays
            complete by itself, but one bad sector can then damage several.
        full_every: Files older than so many generations are no longer shared, so that every
            leaf is written again at least that often. Default: 10.
        sync_directories: Whether a file system that cannot fsync directories (CIFS, some
            FUSE) is refused (default). If not, the file system alone decides when names
            become durable: a power cut may then undo acknowledged saves, but nothing else
            does.
        readers: The ranks that read in a restore, each a share that it sends to the others:
            ``"root"`` (default), ``"node"`` or ``"all"``, as for ``Options.writers``. More
            readers are faster where one host reads more slowly than the network sends. All
            ranks read state that is cut over them, unless this is ``"node"``.
        window_bytes: Host memory through which a restore streams, in bytes.
            Default: 64 MiB.
        message_bytes: Largest MPI message and fused bucket in bytes, at most 1 GiB.
            Default: 8 MiB; broadcasts use at most this, and less between hosts.
        digest_threads: Threads that hash, and copy for an asynchronous save, on each rank.
            Default: 2; more threads than a rank has cores do not help.

    Raises:
        OptionsError: On every rank that makes it, with all faults at once.
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
            "these values of IO cannot be used",
            [
                _one_of("mode", self.mode, "auto", "direct", "buffered"),
                _at_least("full_every", self.full_every, 1),
                _one_of("readers", self.readers, *_RANKS),
                _at_least("window_bytes", self.window_bytes, 1),
                _at_least("message_bytes", self.message_bytes, 64, MESSAGE_BYTES_LIMIT),
                _at_least("digest_threads", self.digest_threads, 1),
            ],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The settings of a manager. Every rank must give the same.

    Attributes:
        retention: Which generations a save keeps; ``|`` joins policies. Default: the 3
            newest.
        interval: When `CheckpointManager.step` saves: every so many steps (an int), after
            so much time (a timedelta, root's clock), as often as is best (``"auto"`` or an
            `AutoInterval`), or never (None, default).
        strict: Whether it is an error (default) if only the program, or only the
            generation, has a state or a leaf; if not, it is left out and reported.
        sync: Whether a save makes the replicas equal first, unless its own ``sync``
            argument says otherwise. If not, root's are saved. Default: yes.
        asynchronous: Whether ``save()`` returns once the states are copied, leaving the
            rest to a thread on root. Costs host memory for one copy, on root. Default: no.
            While a save is under way, the next waits for its end first (True), is left
            out and the pending one is returned (``"skip"``), or raises (``"raise"``).
        writers: The ranks that write. ``"root"`` (default): root alone; no other rank need
            see the directory. ``"node"``: one rank of every host; ``"all"``: every rank.
            Leaves that a sync has proven equal are then split over the writers by bytes.
            Each writes its own file into the directory, which all must see. State that is
            cut over ranks is written where it is, or with ``"node"`` by each host's first.
        preemption_signals: Signals that ask for a last save and a stop; ``step()`` notices
            them. Empty: no handler is installed.
        stop: Other requests to stop: the end of the job, a file, a function.
        abort_on_error: Whether an uncaught exception on one rank alone ends the job, as
            under ``python -m mpi4py``; else the ranks wait for one another for ever. So
            does ``sys.exit`` with an error code out of the manager's ``with`` block.
            Default: yes. Without effect in a job of one rank. ``"communicator"``, on every
            rank, for members of an ensemble that have a manager each: ends the ranks of the
            manager's communicator, and the job when all other members have ended.
        deadline_seconds: How long the ranks wait for one another before every live rank
            raises an error that names the absent ones. Must exceed the longest save.
            Default: 600.
        lock: How a second job is kept out of the directory: by flock (default); by a
            ``"lease"`` as well, a file that root rewrites every 5 s, where the file system
            has no flock: the next job then waits 30 s after a job was killed; or by you
            (``"none"``): the job that starts last is the owner.
        read_only: Whether the manager only restores, without a lock (True), or a restore
            needs a writable directory (False). None (default): if it is not writable,
            `restore` warns that a save will fail.
        io: How bytes move to disk, from disk, and between ranks.
        hooks: Functions that root calls after saves and restores.

    Raises:
        OptionsError: On every rank that makes it, with all faults at once.
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
    hooks: Hooks = Hooks()

    def __post_init__(self) -> None:
        _require(
            "options cannot be used",
            [
                (
                    isinstance(self.retention, RetentionPolicy),
                    f"retention is {self.retention!r}, not a policy such as KeepLast(3)",
                ),
                (is_interval(self.interval), interval_advice(self.interval)),
                _one_of("asynchronous", self.asynchronous, True, False, "skip", "raise"),
                _one_of("writers", self.writers, *_RANKS),
                _one_of("abort_on_error", self.abort_on_error, True, False, "communicator"),
                (isinstance(self.stop, StopWhen), f"stop is {self.stop!r}, not a StopWhen"),
                _above_0("deadline_seconds", self.deadline_seconds),
                _signals("preemption_signals", self.preemption_signals),
                _one_of("lock", self.lock, "flock", "lease", "none"),
                _one_of("read_only", self.read_only, None, True, False),
                (
                    not (self.read_only and self.interval is not None),
                    f"interval is {self.interval!r}, and read_only=True: nothing is saved",
                ),
                (isinstance(self.io, IO), f"io is {self.io!r}, not an IO"),
                (isinstance(self.hooks, Hooks), f"hooks is {self.hooks!r}, not Hooks"),
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
        """Return the fields as text, which ranks compare. Not collective. Thread-safe."""
        return {field.name: repr(getattr(self, field.name)) for field in fields(self)}


def _parse_flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


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
        parse_interval,
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
