# SPDX-License-Identifier: Apache-2.0
"""Begins saves, and keeps the one that is pending."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from mpi_ckpt.comm import abort_job, member_of
from mpi_ckpt.engine.save.background import NICENESS_OF_COPIES, Background
from mpi_ckpt.engine.save.copies import RememberedTiles, copy_into, copy_tiles
from mpi_ckpt.engine.save.cut.own_tiles import TileHistory
from mpi_ckpt.engine.save.cut.survey import survey_tiles, take_tiles
from mpi_ckpt.engine.save.pending import PendingSave
from mpi_ckpt.engine.save.request import Begun, SaveRequest, require_notes
from mpi_ckpt.engine.save.reuse import KnownLeaves
from mpi_ckpt.engine.save.saving import Save
from mpi_ckpt.engine.steps.interval import Durations
from mpi_ckpt.engine.sync.parts import parts_apart, receive_parts, take_parts
from mpi_ckpt.engine.sync.replicas import SyncLog, capture_on_root
from mpi_ckpt.errors import OptionsError, RegistrationError, SaveError
from mpi_ckpt.memory import Arena
from mpi_ckpt.state import LeafState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from mpi_ckpt.comm import Member
    from mpi_ckpt.engine.registry import Registry
    from mpi_ckpt.engine.save.cut.survey import TileSurvey
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import PhaseClock, SaveReport
    from mpi_ckpt.state import State

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Workshop:
    """The resources that the saves of a manager share.

    Attributes:
        arena: Memory for the copies of an asynchronous save.
        background: Root's thread, or another writer's.
        copying: Copies what hosts keep to the directory, beside other saves.
        durations: The times that saves have taken.
        sync_log: Logs what syncs have changed.
        survey: How cut leaves lay on the ranks at the last save; None for none.
        history: The tiles that this rank has in the generation saved last.
        known: On root, the fingerprints of the leaves saved last.
    """

    arena: Arena
    background: Background
    copying: Background
    durations: Durations
    sync_log: SyncLog
    survey: TileSurvey | None = None
    history: TileHistory = field(default_factory=lambda: TileHistory(0, {}))
    known: KnownLeaves = field(default_factory=KnownLeaves)


class Saver:
    """Begins saves, one after the other, and keeps the pending one.

    Main thread only. While root's background thread works, only that thread may use the
    directory: all other code calls `finish` first, or waits for the thread itself.

    Args:
        session: The manager's.
        registry: The manager's.

    Attributes:
        registry: As given.
        durations: The times that saves have taken in this run.
        workshop: The resources that saves share.
        pending: The pending save; None for none.
    """

    def __init__(self, session: Session, registry: Registry) -> None:
        self._session = session
        self.registry = registry
        options = session.options
        how = options.abort_on_error
        end_job = partial(_end_job, member_of(session.comm, how)) if how else None
        background = Background(options.deadline_seconds, end_job)
        drain = None if session.hosts is None else session.hosts.drain
        stop = None if drain is None else drain.stop
        copying = Background(
            options.deadline_seconds, end_job, stop, niceness=NICENESS_OF_COPIES
        )
        self.durations = Durations()
        self.workshop = Workshop(Arena(), background, copying, self.durations, SyncLog())
        self.pending: PendingSave | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still works on the pending save. Not collective."""
        return self.pending is not None and self.pending.is_writing

    def make_way(self) -> PendingSave | None:
        """Finish the pending save, or do what the options say instead.

        Collective.

        Returns:
            The pending save, if no other save is to be made.

        Raises:
            SaveError: On every rank, if the pending save failed, or the options forbid
                another.
        """
        if self.pending and self.pending.level == "local":
            self.finish_pending()  # it may begin a copy
        self._finish_copy()
        asynchronous = self._session.options.asynchronous
        pending = self.pending
        # A pending save to the hosts is no reason to leave out one to the directory.
        if pending and not pending.finished and pending.level == "directory":
            if asynchronous == "skip":
                return pending
            if asynchronous == "raise":
                raise SaveError(
                    "a save is still under way, and Options.asynchronous is 'raise'; that "
                    "save goes on, and no other was begun"
                )
        if asynchronous:
            # Not for the removal of old generations behind it: what the thread writes for
            # the next save comes after that.
            self._finish_pending()
        else:
            self.finish_pending()
        return None

    def begin(
        self,
        only: Collection[str] | None,
        step: int,
        sync: bool | None,
        metrics: Mapping[str, float] | None,
        carry: Callable[[str], bool] | None,
        clock: PhaseClock,
    ) -> Save:
        """Begin a save, after all ranks have agreed on its states. Collective.

        Args:
            only: Names of the states to save; None for all that are not skipped.
            step: Training step to note.
            sync: Whether to make the replicas equal first; None: as in the options.
            metrics: The program's metrics.
            carry: With ``only``: decides on root, by name, which other states to carry
                over; None for all.
            clock: Started with the call of the save.

        Raises:
            RegistrationError: On every rank, if names are unknown or differ, or there are
                no states.
            SaveError: On every rank, if root may not save to the directory, or the step or
                a metric is no number.
        """
        session = self._session
        syncs = session.options.sync if sync is None else sync
        apart = partial(parts_apart, session)
        work = self.work_on_states(only, step, metrics, syncs=syncs, apart=apart)
        begun = self.registry.begin("beginning a save", only, work, error=SaveError)
        return Save(
            session,
            self.workshop,
            begun.result,
            step=step,
            sync=syncs,
            metrics=metrics,
            carry=None if only is None else carry or bool,  # bool(name) is true
            clock=clock,
        )

    def work_on_states(
        self,
        only: Collection[str] | None,
        step: int,
        metrics: Mapping[str, float] | None,
        *,
        syncs: bool,
        apart: Callable[[Sequence[State]], Collection[str]],
    ) -> Callable[[list[State]], Begun]:
        """Return what each rank does with the chosen states when a save begins.

        Not collective. Root must be allowed to save, or the work raises.

        Args:
            only: As for `begin`.
            step: As for `begin`.
            metrics: As for `begin`.
            syncs: Whether the replicas will be made equal.
            apart: Returns the names of states whose parts the ranks write themselves.
        """
        session = self._session
        threads = session.options.io.digest_threads

        def begin(states: list[State]) -> Begun:
            require_notes(step, metrics)
            if only is None and not self.registry.names:
                raise RegistrationError(
                    "this manager has no states, so nothing would be saved: give them as "
                    "CheckpointManager(directory, [state, ...]), or by add(state)"
                )
            # Check this first: a job must learn at once that it may not save here.
            if session.comm.is_root:
                session.directory.own()
            # Take parts after the plain states' sync(), which may change them.
            waits = syncs and any(not isinstance(state, LeafState) for state in states)
            parts = None if waits else take_parts(states, apart(states), threads=threads)
            return Begun(states, parts)

        return begin

    def leave(self, save: Save) -> PendingSave:
        """Leave a save to finish in the background. Not collective."""
        self.durations.note_save(save.seconds)
        self.pending = PendingSave(self._session.comm, save)
        return self.pending

    def end(self, save: Save) -> SaveReport:
        """Return the report of a save that has ended. Not collective."""
        self.durations.note_save(save.seconds)
        assert save.report is not None
        self._note_published(save.report)
        return save.report

    def _note_published(self, report: SaveReport | None) -> None:
        if self._session.hosts is not None and report is not None:
            self._session.hosts.note_published(report.generation)

    def remember(self, step: int) -> None:
        """Copy the states into the `Memory`, without a sync and without a save.

        Collective. No save is pending.

        Args:
            step: Training step to note.

        Raises:
            OptionsError: On every rank, if the manager has no `Memory`.
            CheckpointError: On every rank, if any rank cannot copy a state.
        """
        comm, memory = self._session.comm, self._session.memory
        threads = self._session.options.io.digest_threads
        if memory is None:
            raise OptionsError("remember() needs a manager that was given a Memory")

        def begin(states: list[State]) -> Begun:
            return Begun(states, take_parts(states, threads=threads))

        doing = "beginning to remember the states"
        begun = self.registry.begin(doing, None, begin, error=SaveError).result
        synced = capture_on_root(comm, begun.states, begun.parts, threads=threads)
        tiles = RememberedTiles()
        if synced.is_cut:
            args, options = (comm, synced.captured), self._session.options
            survey = survey_tiles(*args, self.workshop.survey, options)
            self.workshop.survey = survey
            mine = take_tiles(*args, survey, compared=False)
            tiles = copy_tiles(comm, memory, synced.captured, mine, survey)
        captured = receive_parts(comm, synced.parts, synced.captured)
        by_name = {one.name: one for one in captured}
        taken = [by_name.get(state.name, state) for state in begun.states]
        request = SaveRequest(states=taken, step=step, size=comm.size)
        copy_into(memory, comm, request, threads, late=False, tiles=tiles)

    def finish(self) -> None:
        """Finish the pending save and a copy from the hosts: nothing is under way then.

        Collective.

        Raises:
            SaveError: On every rank, if either has failed.
        """
        self.finish_pending()
        self._finish_copy()
        self.workshop.background.join()  # it may remove what the copy replaces

    def _finish_copy(self) -> None:
        drain = None if self._session.hosts is None else self._session.hosts.drain
        if drain is not None:
            drain.finish(self._session, self.workshop)

    def finish_pending(self) -> None:
        """Finish the pending save; root's thread is idle afterwards.

        Collective.

        Raises:
            SaveError: On every rank, if the pending save failed.
        """
        try:
            self._finish_pending()
        finally:
            self.workshop.background.join()  # not collective

    def _finish_pending(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None and not pending.finished:
            start = time.perf_counter()
            pending.wait()
            if pending.level == "directory":
                self.durations.note_end_of_save(time.perf_counter() - start)
        if pending is not None and pending.level == "directory":
            self._note_published(pending.report)

    def close(self) -> bool:
        """Let root's thread finish, and free its memory. Not collective.

        A save that the ranks have not met for finishes in the background and logs its end.

        Returns:
            False if the thread still works after ``Options.deadline_seconds``; the
            directory then still belongs to it.
        """
        pending, self.pending = self.pending, None
        if pending is not None and not pending.finished:
            pending.leave()
        # A copy that is not finished is given up: the next start removes its files.
        if not self.workshop.copying.close(self._session.options.deadline_seconds):
            logger.error("a copy is still under way, and is not waited for any longer")
            return False
        if not self.workshop.background.close(self._session.options.deadline_seconds):
            logger.error("a save is still under way, and is not waited for any longer")
            return False
        self.workshop.arena.close()
        return True

    def let_go(self) -> None:
        """Close; release the directory unless the thread still writes. Not collective."""
        if self.close():
            self._session.directory.close()
            if self._session.hosts is not None:
                self._session.hosts.close()


def _end_job(member: Member | None) -> None:
    logger.critical(
        "the program has ended, but a save has not, and would keep it waiting: the job is "
        "aborted%s",
        "" if member is None else " when its other members have ended",
    )
    if member is not None:
        member.outlive()
    abort_job(1)
