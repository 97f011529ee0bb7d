# SPDX-License-Identifier: Apache-2.0
"""Runs one save in its steps: sync, stage, write, publish, prune.

If root writes alone, it publishes right after writing. If several ranks write, each by its
`JointWrite`, root publishes after all have agreed. Only leaves that every rank has proven
equal are shared out: root writes plain states, and leaves that were not compared or had to
be made equal. The ranks write the tiles of cut leaves that they have.
"""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import agree, choose_ranks, on_root
from mpi_ckpt.engine.save.background import run_here
from mpi_ckpt.engine.save.copies import RememberedTiles, copy_into, copy_tiles
from mpi_ckpt.engine.save.cut.survey import survey_tiles, take_tiles
from mpi_ckpt.engine.save.request import SaveRequest, make_report
from mpi_ckpt.engine.save.reuse import KnownLeaves
from mpi_ckpt.engine.save.staging import LateCopies, stage
from mpi_ckpt.engine.save.writers import JointWrite, LoneWrite
from mpi_ckpt.engine.sync.captured import CapturedState, digest_states
from mpi_ckpt.engine.sync.parts import PartsInTransit, parts_apart, receive_parts
from mpi_ckpt.engine.sync.replicas import (
    SyncedStates,
    capture_on_root,
    compare_beside,
    sync_states,
)
from mpi_ckpt.errors import SaveError
from mpi_ckpt.reports import SyncReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpi_ckpt.engine.save.cut.own_tiles import CapturedTiles
    from mpi_ckpt.engine.save.cut.survey import TileSurvey
    from mpi_ckpt.engine.save.request import Begun, Published
    from mpi_ckpt.engine.save.saver import Workshop
    from mpi_ckpt.engine.save.shard import ShardImage
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import PhaseClock, SaveReport
    from mpi_ckpt.state import State


class Save:
    """One save: its methods are its steps, called in this order.

    Collective, as is every method unless it says otherwise. Main thread only.

    Args:
        session: The manager's.
        workshop: The resources that saves share.
        begun: The states to save.
        step: Training step to note.
        sync: Whether to make the replicas equal first; if not, root's are saved.
        metrics: The program's metrics.
        carry: Decides by name which other states of the newest generation to carry over;
            None if all states are saved.
        clock: Started with the call of the save.

    Attributes:
        step: The training step.
        work: This rank's work, once it has begun; None if it has none.
        published: The published generation, on root.
        report: The report of the save, once it was acknowledged.
    """

    def __init__(
        self,
        session: Session,
        workshop: Workshop,
        begun: Begun,
        *,
        step: int,
        sync: bool,
        metrics: Mapping[str, float] | None,
        carry: Callable[[str], bool] | None,
        clock: PhaseClock,
    ) -> None:
        self._session = session
        self._workshop = workshop
        self._begun = begun
        self._syncs = sync
        self._clock = clock
        size, metrics = session.comm.size, {} if metrics is None else dict(metrics)
        self._request = SaveRequest(
            states=(), step=step, size=size, metrics=metrics, carry=carry
        )
        self._synced = SyncedStates([], SyncReport(), is_cut=False)
        self._mine: Sequence[CapturedState | State] = ()
        self._late = LateCopies()
        self._image: ShardImage | None = None
        self._survey: TileSurvey | None = None
        self._tiles: Sequence[CapturedTiles] = ()
        self._parts = PartsInTransit.none(session.comm)
        self._joint: JointWrite | None = None
        self._lone: LoneWrite | None = None
        self.step = step
        self.work: Future[None] | None = None
        self.published: Published | None = None
        self.report: SaveReport | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the save began. Not collective."""
        return self._clock.seconds()["total"]

    def sync(self) -> None:
        """Capture the contents, and make the replicas equal.

        Large replicas are compared later, beside root's copying or writing.

        Raises:
            CheckpointError: On every rank, if any rank cannot sync or capture the states.
        """
        comm, states, parts = self._session.comm, self._begun.states, self._begun.parts
        options, apart = self._session.options, parts_apart(self._session, states)
        with self._clock.phase("sync"):
            if self._syncs:
                # Other writers, and a copy in memory, need replicas that are equal.
                alone = options.writers == "root" and self._session.memory is None
                synced = sync_states(
                    comm, states, options, parts=parts, apart=apart, may_wait=alone
                )
            else:
                threads = options.io.digest_threads
                synced = capture_on_root(comm, states, parts, apart, threads=threads)
            if synced.is_cut:
                self._survey = self._workshop.survey = survey_tiles(
                    comm, synced.captured, self._workshop.survey, options
                )
                self._tiles = take_tiles(comm, synced.captured, self._survey)
        self._note_synced(synced)
        self._parts, captured = synced.parts or self._parts, synced.captured
        if self._session.memory is not None:
            captured = receive_parts(comm, self._parts, captured)
        by_name = {one.name: one for one in captured}
        taken = [by_name.get(state.name, state) for state in states]
        self._request = replace(self._request, states=taken)

    def stage(self) -> None:
        """Share out the work, and copy contents that may change before they are written.

        Raises:
            SaveError: On every rank, if root cannot begin a generation, or any rank cannot
                copy a state.
        """
        comm, options = self._session.comm, self._session.options
        is_copied = self._copy_into_memory()
        writers = choose_ranks(options.writers, comm.topology)
        # All ranks know the result of the comparison: every rank takes the same branch.
        equal = self._synced.proven_equal
        if self._survey is not None or (len(writers) > 1 and equal):
            self._workshop.background.join()  # it may still remove old generations
            self._joint = JointWrite(
                self._session,
                self._request,
                self._survey,
                self._tiles,
                self._workshop.history,
                self._parts,
            )
            self._mine = self._joint.begin(writers, equal, self._clock)
        elif comm.is_root:
            self._mine = self._request.states
        if options.asynchronous and not is_copied:
            try:
                self._compare_beside("staging a save", self._copy)
            except BaseException:
                self.abandon()
                raise

    def write(self) -> None:
        """Write this rank's share: now, or in the background.

        Not collective. `publish` reports how it ends. If root is the only writer, this
        publishes as well, unless the replicas are still to be compared.
        """
        gives = self._parts.are_here or (self._joint is not None and self._joint.carries)
        if not (self._mine or gives or self._session.comm.is_root):
            return
        if not self._session.options.asynchronous:
            self.work = run_here(self._write)
            return
        # Before the training goes on: an optimizer's step now waits for the copy.
        copied: Future[None] = Future()
        for gate in self._late.gates:
            gate.hold(copied)
        # Last: from now on this thread and the other take turns at Python.
        self.work = self._workshop.background.submit(lambda: self._copy_and_write(copied))

    def publish(self) -> None:
        """Agree on how the writing ended; let root publish the generation, and report it.

        Raises:
            SaveError: On every rank; nothing was published.
        """
        comm, wait = self._session.comm, self._await_work
        try:
            if self._joint is None:
                if self._synced.uncompared:
                    self._compare_beside("saving", self._written)
                facts = on_root(
                    comm, "saving", self._conclude, error=SaveError, others=wait
                )
            else:
                doing = "writing a share of a save"
                agree(comm, doing, wait, error=SaveError)
                files = self._joint.gather_files()
                publish = partial(self._publish, self._joint, files)
                facts = on_root(comm, "publishing", publish, error=SaveError)
        except BaseException:
            self.abandon()
            raise
        seconds = {**facts["seconds"], **self._clock.seconds()}
        self.report = make_report(facts, self.step, comm.size, seconds, self._synced.report)
        self._workshop.durations.note_durable(self.report.seconds["total"])
        if self._joint is not None and self._survey is not None:
            self._workshop.history = self._joint.history
        if self.published is not None:
            number, captured = self.published.generation, self._request.captured
            self._workshop.known = KnownLeaves.of(number, captured)
        # Else Python's next garbage collection would scan these.
        self._request = replace(self._request, states=())
        self._mine, self._tiles, self._joint, self._lone = (), (), None, None
        self._synced = replace(self._synced, captured=[])
        self._parts = PartsInTransit.none(comm)

    def prune(self) -> None:
        """Remove generations that retention no longer keeps; report the save.

        Not collective. In the background: every rank knows by now that the new generation
        is durable, so those that it replaces may go, and no rank needs to wait for that.
        """
        if (published := self.published) is not None:
            self._session.note("saved", int(self.step))
            if published.retired:
                remove, retired = self._session.directory.remove, published.retired
                self._workshop.background.submit(lambda: remove(retired))
        assert self.report is not None
        self._session.observer.note_save(self.report)

    def abandon(self) -> None:
        """Remove the partial. Not collective. No rank still writes."""
        for written in (self._joint, self._lone):
            if written is not None:
                written.drop()

    def _copy_into_memory(self) -> bool:
        """Copy the states into the `Memory`, if any; return whether the copy is saved."""
        session, request = self._session, self._request
        if session.memory is None:
            return False
        if request.carry is not None:
            session.memory.clear()  # a copy of only some states would be incomplete
            return False
        memory, comm, survey = session.memory, session.comm, self._survey
        late = bool(session.options.asynchronous) and survey is None
        with self._clock.phase("stage"):
            tiles, captured = RememberedTiles(), self._synced.captured
            if survey is not None:
                tiles = copy_tiles(comm, memory, captured, self._tiles, survey)
            threads = session.options.io.digest_threads
            staged = copy_into(memory, comm, request, threads, late=late, tiles=tiles)
        if survey is not None:
            return False  # each rank writes its share from the states
        if staged is not None:
            self._request = replace(request, states=staged.states)
            self._late, self._image = staged.late, staged.image
        return True

    def _note_synced(self, synced: SyncedStates) -> None:
        self._synced = synced
        if self._syncs and self._session.comm.is_root and not synced.uncompared:
            states = self._begun.states
            self._workshop.sync_log.log_save(synced.report, states, self.step)

    def _compare_beside(self, doing: str, work: Callable[[], list[CapturedState]]) -> None:
        """Do work, and compare the replicas if they are not compared yet. Collective."""
        comm, options = self._session.comm, self._session.options
        if not self._synced.uncompared:
            agree(comm, doing, work, error=SaveError)
            return
        self._note_synced(compare_beside(comm, self._synced, options, doing, work))

    def _copy(self) -> list[CapturedState]:
        """Copy what this rank writes; return the states to compare, digested."""
        todo, threads = self._synced.uncompared, self._session.options.io.digest_threads
        parts = self._parts.fetch(self._mine)
        if not self._mine:
            return digest_states(todo, threads)
        names, arena = [one.name for one in todo], self._workshop.arena
        with self._clock.phase("stage"):
            mine = [parts.get(one.name, one) for one in self._mine]
            staged = stage(arena, mine, threads=threads, digested=names)
        self._mine, self._late, self._image = staged.states, staged.late, staged.image
        copies = {o.name: o.digests for o in staged.states if isinstance(o, CapturedState)}
        return [replace(one, digests=copies[one.name]) for one in todo]

    def _written(self) -> list[CapturedState]:
        """Wait until root has written; return the states to compare, digested."""
        todo, threads = self._synced.uncompared, self._session.options.io.digest_threads
        self._await_work()
        return self._lone.digested(todo) if self._lone else digest_states(todo, threads)

    def _copy_and_write(self, copied: Future[None]) -> None:
        """Make the late copies, and do this rank's work. In the background."""
        try:
            self._late.copy()
        finally:
            copied.set_result(None)  # also of a failed copy: the training goes on
        self._write()

    def _write(self) -> None:
        """Do this rank's work. On any thread; no MPI."""
        session, clock = self._session, self._clock
        behind = session.options.asynchronous
        with session.watch_behind(clock) if behind else nullcontext():
            if self._joint is not None:
                with clock.phase("write"):
                    self._joint.write(self._mine, self._image)
                return
            with self._parts.handed_over():
                if not session.comm.is_root:
                    return
                self._lone = LoneWrite(session, clock, self._workshop.known)
                self._lone.write(replace(self._request, states=self._mine), self._image)
            if not self._synced.uncompared:
                self.published = self._lone.publish()

    def _await_work(self) -> None:
        if self.work is not None:
            self.work.result()

    def _publish(self, joint: JointWrite, files: Sequence[bytes]) -> dict[str, Any]:
        """Publish once all ranks have written their files. On root."""
        self.published = joint.publish(files, self._clock)
        return self._conclude()

    def _conclude(self) -> dict[str, Any]:
        """Wait until root has written and published. On root."""
        self._await_work()
        if self.published is None and self._lone is not None:
            self.published = self._lone.publish()  # by now the replicas are equal
        assert self.published is not None
        return self.published.to_json() | {"seconds": self._clock.seconds()}
