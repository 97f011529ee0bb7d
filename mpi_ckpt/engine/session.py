# SPDX-License-Identifier: Apache-2.0
"""Bundles the ranks, the directory and the options for all steps of a manager."""

from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import (
    Communicator,
    agree,
    compare_texts,
    is_rank_failure,
    meet,
    printed_by,
)
from mpi_ckpt.engine.abort import watch_errors
from mpi_ckpt.engine.observer import Observer, Timeline
from mpi_ckpt.engine.watchdog import Watchdog
from mpi_ckpt.errors import CheckpointError, OptionsError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.storage.directory import CheckpointDirectory
from mpi_ckpt.storage.notes import Notes
from mpi_ckpt.storage.owning.ownership import Ownership

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mpi4py import MPI

    from mpi_ckpt.engine.hosts.level import HostLevel
    from mpi_ckpt.memory import Memory
    from mpi_ckpt.options import Options
    from mpi_ckpt.reports import PhaseClock

logger = logging.getLogger(__name__)

_QUIET_SECONDS_MAX = 60.0
_QUIET_SHARE = 0.1
"""Of the deadline: the rank that stands still says so well before the others give up."""


@dataclass(frozen=True, slots=True)
class Session:
    """The ranks, the directory and the options of one manager.

    Attributes:
        comm: The manager's communicator.
        directory: The checkpoint directory; used on root only.
        options: The options, the same on every rank.
        observer: Reports what the ranks do.
        timeline: Records what they do when.
        memory: The `Memory` that keeps copies of saves; None for none.
        hosts: The local level; None for none.
        notes: Notes for `mpi-ckpt run`, if it started this job.
    """

    comm: Communicator
    directory: CheckpointDirectory
    options: Options
    observer: Observer
    timeline: Timeline
    memory: Memory | None = None
    hosts: HostLevel | None = None
    notes: Notes = field(default_factory=Notes.from_environment)

    @classmethod
    def begin(
        cls,
        root: str | PathLike[str],
        comm: MPI.Intracomm | None,
        options: Options,
        memory: Memory | None,
        hosts: HostLevel | None = None,
    ) -> Session:
        """Begin a session over a duplicate of a communicator. Collective. Main thread only.

        Raises:
            LaunchError: On every rank, if launcher and MPI disagree about the job.
            OptionsError: On every rank, if the path is not a usable directory on any.
        """
        if not hasattr(options, "abort_on_error"):
            raise OptionsError(
                f"options is {options!r}, not Options: give Options(interval=500, ...)"
            )
        if options.abort_on_error:
            watch_errors()
        communicator = Communicator(comm, deadline_seconds=options.deadline_seconds)

        def find() -> CheckpointDirectory:
            given: object = root
            if not isinstance(given, str | PathLike) or not os.fspath(given):
                raise OptionsError(
                    f"the directory is {root!r}: give the path of a directory, which need "
                    "not exist"
                )
            directory = CheckpointDirectory(
                _absolute(Path(root)),
                options.io.mode,
                Ownership(
                    locking=options.lock,
                    read_only=options.read_only,
                    sync_names=options.io.sync_directories,
                ),
            )
            directory.goes_on = False
            return directory

        try:
            directory = agree(
                communicator, "finding the directory", find, error=OptionsError
            )
        except CheckpointError:
            communicator.close()
            raise
        communicator.busy_ranks.open()
        timeline = Timeline.from_environment(communicator)
        observer = Observer(communicator, directory, options.hooks, timeline)
        return cls(communicator, directory, options, observer, timeline, memory, hosts)

    def note(self, event: str, step: int) -> None:
        """Note an event for `mpi-ckpt run`. Not collective. Has an effect on root only."""
        if self.comm.is_root:
            self.notes.add(event, step=step, directory=str(self.directory.root))

    def note_end(
        self, step: int, error: BaseException | None = None, *, unsaved: bool = False
    ) -> None:
        """Note how this rank leaves the manager. Not collective.

        Args:
            step: The training step.
            error: The exception that it leaves by; None at a normal end.
            unsaved: Whether this exception cuts off a pending save.
        """
        self.observer.note_end(step, error)
        left_well = isinstance(error, SystemExit) and not error.code and not unsaved
        if error is None or left_well:
            self.note("finished", step)
        elif is_rank_failure(error):
            return  # the job may recover; if not, its exit code shows it
        # All ranks raise an error of this package: root's note is enough.
        elif self.comm.is_root or not isinstance(error, CheckpointError):
            self.notes.add_error(error, step=step, directory=str(self.directory.root))

    def compare_options(self) -> None:
        """Require the same options on every rank.

        Collective. Main thread only. Called once, before anything else meets.

        Raises:
            OptionsError: On every rank, if they differ.
        """

        def describe() -> list[str]:
            texts = [f"{name}={value}" for name, value in self.options.describe().items()]
            texts.append(f"memory={self.memory and self.memory.describe()}")
            return [*texts, f"local={self.hosts and self.hosts.local.describe()}"]

        def digest(texts: list[str]) -> bytes:
            return digest_bytes("\n".join(texts).encode())

        met = meet(
            self.comm,
            "reading the options",
            describe,
            error=OptionsError,
            digest=digest,
            flag=lambda _: self.timeline.is_wanted,
        )
        if not met.is_alike:
            problems = compare_texts(self.comm, "comparing options", met.result)
            error = OptionsError(
                "the ranks were given different options:\n  " + "\n  ".join(problems),
                problems=problems,
            )
            raise printed_by(self.comm, error)
        # Not earlier: ranks that cut messages differently could not report the difference.
        self.comm.set_limits(message_bytes=self.options.io.message_bytes)
        if met.is_flagged:
            self.timeline.start()

    def close(self) -> None:
        """Complete the timeline, and free the communicator. Collective. Callable twice."""
        if self.comm.is_open and self.comm.can_meet():
            self.timeline.close()
        self.comm.close()

    @contextmanager
    def let_go_of_if_refused(self) -> Iterator[None]:
        """Close the communicator if an agreement in the block fails. Collective."""
        try:
            yield
        except CheckpointError:
            self.comm.close()
            raise

    @contextmanager
    def watch(self, doing: str) -> Iterator[PhaseClock]:
        """Time an operation of all ranks, and warn if this one makes no progress in it.

        Collective, if there is a timeline. Main thread only. Time spent waiting for other
        ranks does not count: those warn themselves. Python collects no garbage meanwhile:
        see `without_collections`.
        """
        clock, comm = self.observer.begin(doing), self.comm
        start = time.perf_counter()
        self.timeline.begin()

        def steps() -> object:
            return object() if comm.is_waiting else comm.completed

        try:
            with self._watchdog(doing, steps, clock), without_collections():
                yield clock
        finally:
            self.observer.pause(clock)
            self.timeline.end(doing, start)
        # Not after an error: a rank may be absent.
        self.timeline.flush()

    @contextmanager
    def watch_behind(self, clock: PhaseClock, doing: str = "saving") -> Iterator[None]:
        """Warn if a save in the background makes no progress. Not collective.

        Args:
            clock: The save's clock.
            doing: What it is, as given to `watch`.
        """
        self.observer.resume(doing, clock)
        try:
            with self._watchdog(doing, lambda: None, clock), without_collections():
                yield
        finally:
            self.observer.pause(clock)

    def _watchdog(
        self, doing: str, steps: Callable[[], object], clock: PhaseClock
    ) -> Watchdog:
        quiet = min(_QUIET_SECONDS_MAX, _QUIET_SHARE * self.options.deadline_seconds)
        started = time.monotonic()

        def report() -> None:
            if self.comm.is_root:
                seconds = time.monotonic() - started
                logger.info(self.observer.describe_progress(doing, clock, seconds))

        return Watchdog(
            f"{self.comm.name}, {doing}", quiet, steps, lambda: clock.current, report
        )


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except FileNotFoundError as error:
        raise OptionsError(
            f"the directory is {str(path)!r}, and the working directory of this process "
            "has been removed: start the program where all ranks have one, or give a path "
            "that begins with /",
            path=path,
            errno=error.errno,
        ) from error
