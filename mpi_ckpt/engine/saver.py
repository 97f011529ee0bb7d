# SPDX-License-Identifier: Apache-2.0
"""Carries a save out: at once, or behind the training's back."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Protocol

from mpi_ckpt.comm import abort_job, agree
from mpi_ckpt.engine.background import Background
from mpi_ckpt.engine.costs import Costs
from mpi_ckpt.engine.joint import JointSave
from mpi_ckpt.engine.pending import PendingSave
from mpi_ckpt.engine.report import report_save
from mpi_ckpt.engine.solo import SoloSave
from mpi_ckpt.engine.writers import choose_ranks
from mpi_ckpt.errors import SaveError
from mpi_ckpt.memory import Arena

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from mpi_ckpt.engine.draft import Published, SaveRequest
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.stage import LateCopies
    from mpi_ckpt.reports import PhaseClock, SaveReport, SyncReport

__all__ = ["Saver"]

logger = logging.getLogger(__name__)


class SaveWork(Protocol):
    """One save, in the steps in which it can be done behind the training's back.

    Attributes:
        writes_here: Whether this rank writes any file.
        published: What root has published, on root.
    """

    writes_here: bool
    published: Published | None

    def stage(self, arena: Arena) -> LateCopies:
        """Copy what this rank writes. Not collective. On ranks that write.

        Returns:
            What remains to be copied before `write`.
        """

    def write(self) -> None:
        """Write it. Not collective. On ranks that write, on any thread; no MPI."""

    def conclude(self, written: Callable[[], None]) -> Published | None:
        """Agree on how `write` ended everywhere, and have the generation published.

        Collective.

        Args:
            written: Returns when this rank's `write` has ended, raises if it failed.

        Returns:
            What root published; None elsewhere.
        """

    def abandon(self) -> None:
        """Leave nothing behind. Not collective. No rank writes any more."""


class Saver:
    """Writes, publishes, acknowledges and prunes; knows what is under way.

    Main thread only. The directory is root's background thread's while that works, so
    everything that touches it calls `finish` first.

    Args:
        session: The manager's.

    Attributes:
        costs: What saves have taken in this run.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._arena = Arena()
        options = session.options
        self._background = Background(
            options.deadline_seconds, _end_job if options.abort_on_error else None
        )
        self.costs = Costs()
        self.pending: PendingSave | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still works on the pending save. Not collective."""
        return self.pending is not None and self.pending.is_writing

    def make_way(self) -> PendingSave | None:
        """End a save that is under way, or do as the options say about it.

        Collective.

        Returns:
            The pending save, if another shall not be made.

        Raises:
            SaveError: On every rank, if the pending save failed, or is in the way.
        """
        when_pending = self._session.options.when_pending
        if self.pending is not None and not self.pending.finished:
            if when_pending == "skip":
                return self.pending
            if when_pending == "raise":
                raise SaveError(
                    "a save is still under way, and Options.when_pending is 'raise'; it "
                    "goes on, nothing else was saved"
                )
        self.finish()
        return None

    def save(
        self, request: SaveRequest, synced: SyncReport, clock: PhaseClock
    ) -> SaveReport | PendingSave:
        """Save what is asked for, in the way the options say.

        Collective. Nothing is pending.

        Args:
            request: What to save.
            synced: What the sync did: says what may be shared out, and for the report.
            clock: Started when the save was asked for.

        Raises:
            SaveError: On every rank; nothing was published.
        """
        saved = self._save(request, synced, clock)
        self.costs.note_save(clock.seconds()["total"])
        return saved

    def _save(
        self, request: SaveRequest, synced: SyncReport, clock: PhaseClock
    ) -> SaveReport | PendingSave:
        session = self._session
        work = self._plan(request, synced, clock)

        def conclude(written: Callable[[], None]) -> SaveReport:
            published = work.conclude(written)
            return self._acknowledge(published, request, synced, clock)

        if not session.options.asynchronous:
            return conclude(work.write if work.writes_here else _nothing)
        try:
            future = agree(
                session.comm,
                "staging a save",
                lambda: self._submit(work, clock),
                error=SaveError,
            )
        except BaseException:
            # A rank that could stage is writing by now.
            self._background.join()
            work.abandon()
            raise
        orphaned = partial(_tell_root_of, work, request.step, session.comm.is_root)
        self.pending = PendingSave(session, future, conclude, orphaned)
        return self.pending

    def finish(self) -> None:
        """End what is under way; root's thread is idle after.

        Collective.

        Raises:
            SaveError: On every rank, if the pending save failed.
        """
        pending, self.pending = self.pending, None
        try:
            if pending is not None and not pending.finished:
                start = time.perf_counter()
                pending.wait()
                self.costs.note_end_of_save(time.perf_counter() - start)
        finally:
            self._background.join()  # not collective

    def close(self) -> bool:
        """Let root's thread finish, and give back its memory. Not collective.

        A save that the ranks have not met for is left to its end, and that is told.

        Returns:
            False if the thread is still at work after ``Options.deadline_seconds``; the
            directory is then still its own.
        """
        pending, self.pending = self.pending, None
        if pending is not None and not pending.finished:
            pending.leave()
        if not self._background.close(self._session.options.deadline_seconds):
            logger.error("a save is still under way, and is not waited for any longer")
            return False
        self._arena.close()
        return True

    def _plan(
        self, request: SaveRequest, synced: SyncReport, clock: PhaseClock
    ) -> SaveWork:
        session = self._session
        writers = choose_ranks(session.options.writers, session.comm.topology)
        compared = {one.name for one in request.contents if one.digests is not None}
        equal = compared - set(synced.differing)
        # What was compared is known to all: every rank goes the same way.
        if len(writers) == 1 or not equal:
            return SoloSave(session, request, clock)
        return JointSave(session, request, equal, clock)

    def _submit(self, work: SaveWork, clock: PhaseClock) -> Future[None] | None:
        if not work.writes_here:
            return None
        with clock.phase("stage"):
            late = work.stage(self._arena)
        watch = self._session.watch_behind

        def write() -> None:
            with watch(clock):
                work.write()

        if not late:
            return self._background.submit(write)
        copied = self._background.submit(late.copy)
        for gate in late.gates:
            gate.hold(copied)

        def write_copied() -> None:
            copied.result()
            write()

        return self._background.submit(write_copied)

    def _acknowledge(
        self,
        published: Published | None,
        request: SaveRequest,
        synced: SyncReport,
        clock: PhaseClock,
    ) -> SaveReport:
        report = report_save(
            self._session, published, step=request.step, synced=synced, clock=clock
        )
        self.costs.note_durable(report.seconds["total"])
        # Every rank has heard by now that the new generation is durable: what it
        # replaces may go, and nobody needs to wait for that.
        if published is not None:
            self._session.note("saved", int(request.step))
        if published is not None and published.retired:
            directory, retired = self._session.directory, published.retired
            self._background.submit(lambda: directory.remove(retired))
        return report


def _nothing() -> None:
    """Stand for the work of a rank that has none."""


def _end_job() -> None:
    logger.critical(
        "the program is at its end, but a save is not and makes it wait: the job is aborted"
    )
    abort_job(1)


def _tell_root_of(work: SaveWork, step: int, is_root: bool, done: Future[None]) -> None:
    """Say what became of a save for which the ranks did not meet any more."""
    if not is_root:
        return
    left = f"the save of step {step} was left without wait() or close()"
    failure = done.exception()
    if failure is not None:
        logger.error("%s and has failed; nothing was published: %s", left, failure)
    elif work.published is not None:
        logger.warning("%s; generation %d is durable", left, work.published.generation)
    else:
        logger.warning(
            "%s and is given up: what several ranks write only all together can publish; "
            "what is there of it is swept at the next start",
            left,
        )
