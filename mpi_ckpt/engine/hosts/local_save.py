# SPDX-License-Identifier: Apache-2.0
"""Makes one local save: the hosts' leaders write the shares that they hold.

sync      capture the contents; make the replicas equal, but for large ones
place     all leaders plan the same generation
write     each leader copies or writes its files; large replicas are compared in that pass
publish   all have written the same: each renames; all have renamed: the generation is kept
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, gather_bytes, meet
from mpi_ckpt.engine.hosts.copying.directory_copy import LocalSource
from mpi_ckpt.engine.hosts.host_tiles import describe_tiles, survey_hosts
from mpi_ckpt.engine.hosts.level import HostNames
from mpi_ckpt.engine.hosts.placing import LocalContents, place_generation
from mpi_ckpt.engine.hosts.share_writer import ShareWriter
from mpi_ckpt.engine.save.copies import RememberedTiles, copy_into, copy_tiles
from mpi_ckpt.engine.save.request import SaveRequest
from mpi_ckpt.engine.sync.captured import digest_states
from mpi_ckpt.engine.sync.parts import receive_parts
from mpi_ckpt.engine.sync.replicas import SyncedStates, compare_beside, sync_states
from mpi_ckpt.errors import CheckpointError, SaveError, StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.digest import DIGEST_BYTES, digest_bytes
from mpi_ckpt.reports import SaveReport, SyncReport
from mpi_ckpt.states.unshared.ranked import RankedState
from mpi_ckpt.storage.format.layout import generation_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.hosts.host_tiles import DescribedTiles
    from mpi_ckpt.engine.hosts.level import HostLevel
    from mpi_ckpt.engine.hosts.placing import Placed
    from mpi_ckpt.engine.save.request import Begun, Published
    from mpi_ckpt.engine.save.saver import Workshop
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.memory import Memory
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.format.manifest import Manifest

logger = logging.getLogger(__name__)


_LENGTH_BYTES = 8
_COMPARING = "comparing the parts of ranks"


def parts_on_hosts(session: Session, states: Sequence[State]) -> frozenset[str]:
    """Return the names of the states whose parts stay on the hosts of their ranks.

    Not collective: the same on every rank. A copy in memory must hold all parts: then root
    has them anyway, and gives them to the hosts.
    """
    if session.memory is not None:
        return frozenset()
    return frozenset(state.name for state in states if isinstance(state, RankedState))


def compare_parts(comm: Communicator, captured: Sequence[CapturedState]) -> None:
    """Compare the parts that ranks have captured as cut leaves, one allreduce in all.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        captured: The contents of this rank.

    Raises:
        StageError: On every rank, if the parts do not belong together.
        DivergedError: On every rank, if something that all ranks share differs.
    """
    parts = [one for one in captured if isinstance(one.state, RankedState) and one.cut]

    def describe() -> bytes:
        values = []
        for one in parts:
            assert isinstance(one.state, RankedState)
            with concerning(f"state {one.name!r}"):
                # The first leaf of a part is its structure.
                text = bytes((one.cut[0].tiles or ())[0].buffer.read())
                values.append(one.state.alike(json.loads(text)))
        return json.dumps(values, sort_keys=True).encode()

    met = meet(comm, _COMPARING, describe, error=StageError, digest=digest_bytes)
    if met.is_alike:
        return
    gathered = gather_bytes(comm, met.result, _COMPARING)

    def compare() -> None:
        of_ranks = [json.loads(one) for one in gathered]
        for number, one in enumerate(parts if comm.is_root else ()):
            assert isinstance(one.state, RankedState)
            with concerning(f"state {one.name!r}"):
                one.state.compare([values[number] for values in of_ranks])

    agree(comm, _COMPARING, compare, error=StageError)


class LocalSave:
    """One local save: its methods are its steps, called in this order.

    Collective, as is every method unless it says otherwise. Main thread only. Errors of
    `sync` are those of any save. What fails later on a host fails the save, and not the
    training: `fail` reports it.

    Args:
        session: The manager's.
        level: The local level.
        workshop: The resources that saves share.
        begun: The states to save.
        step: Training step to note.
        metrics: The program's metrics.
        clock: Started with the call of the save.
        is_copied: Whether it is to be copied to the directory once it is kept.

    Attributes:
        step: The training step.
        work: This rank's work, once it has begun; None if it has none.
        published: None: a local save publishes nothing.
        report: The report, once all ranks know how the save ended.
    """

    def __init__(
        self,
        session: Session,
        level: HostLevel,
        workshop: Workshop,
        begun: Begun,
        *,
        step: int,
        metrics: Mapping[str, float] | None,
        clock: PhaseClock,
        is_copied: bool = False,
    ) -> None:
        self._session = session
        self._level = level
        self._is_copied = is_copied
        self._workshop = workshop
        self._begun = begun
        self._contents = LocalContents((), (), step, dict(metrics or {}))
        self._clock = clock
        self._synced = SyncedStates([], SyncReport(), is_cut=False)
        self._hosts = HostNames.of(session.comm, level.local)
        self._placed: Placed | None = None
        self._writer: ShareWriter | None = None
        self.step = step
        self.work: Future[None] | None = None
        self.published: Published | None = None
        self.report: SaveReport | None = None

    def sync(self) -> None:
        """Make the replicas equal, and capture their contents.

        Raises:
            CheckpointError: On every rank, if any rank cannot sync or capture the states.
        """
        session, states = self._session, self._begun.states
        comm, step, metrics = session.comm, self.step, self._contents.metrics
        with self._clock.phase("sync"):
            apart = parts_on_hosts(session, states)
            # A copy in memory needs replicas that are equal. What hosts have copied or
            # written of replicas that then differ is in vain, and they often differ again.
            waits = session.memory is None and not self._level.is_likely_unequal
            synced = sync_states(
                comm,
                states,
                session.options,
                parts=self._begun.parts,
                apart=apart,
                may_wait=waits,
                also_cut=waits,
            )
            tiles = None
            if synced.is_cut:
                tiles = self._describe(synced.captured, has_parts=bool(apart))
            # For a copy in memory. All leaders plan at once, so root cannot receive parts
            # while it writes them.
            captured = receive_parts(comm, synced.parts, synced.captured)
        if not synced.uncompared:
            self._level.is_likely_unequal = bool(synced.report.differing)
        self._contents = LocalContents((), (), step, metrics, tiles)
        self._take(replace(synced, captured=list(captured)))
        if session.memory is not None:
            with self._clock.phase("stage"):
                self._copy_into_memory(session.memory, synced.captured)

    def _take(self, synced: SyncedStates) -> None:
        """Take the contents that a sync has returned."""
        by_name = {one.name: one for one in synced.captured}
        taken = [by_name.get(state.name, state) for state in self._begun.states]
        differing = synced.report.differing
        self._synced = synced
        self._contents = replace(self._contents, states=taken, differed=differing)

    def _copy_into_memory(self, memory: Memory, captured: Sequence[CapturedState]) -> None:
        """Copy the contents into the memory. Collective."""
        # INVARIANT: the copy in memory is never older than a generation on hosts: a
        # restore takes it first.
        comm, contents = self._session.comm, self._contents
        request = SaveRequest(
            states=contents.states,
            step=self.step,
            size=comm.size,
            metrics=contents.metrics,
        )
        remembered, survey = RememberedTiles(), self._level.survey
        if contents.tiles is not None and survey is not None:
            tiles = contents.tiles.captured
            remembered = copy_tiles(comm, memory, captured, tiles, survey.ranks)
        threads = self._session.options.io.digest_threads
        copy_into(memory, comm, request, threads, late=False, tiles=remembered)

    def _describe(
        self, captured: Sequence[CapturedState], *, has_parts: bool
    ) -> DescribedTiles:
        """Describe what is cut over the ranks, and their parts. Collective."""
        session, level = self._session, self._level
        if has_parts:
            compare_parts(session.comm, captured)
        level.survey = survey_hosts(session, captured, level.survey)
        return describe_tiles(session.comm, captured, level.survey)

    def place(self) -> None:
        """Plan the generation on every leader; send it what only root has.

        Raises:
            StageError: On every rank, if a state cannot give its contents.
            CheckpointError: On every rank, if the leaders cannot plan one generation.
        """
        session, level, hosts = self._session, self._level, self._hosts
        self._placed = placed = place_generation(session, level, hosts, self._contents)
        if placed.plan is not None:
            host = hosts.leaders.index(session.comm.rank)
            threads = session.options.io.digest_threads
            self._writer = ShareWriter(level, placed, host, threads)

    def write(self) -> None:
        """Copy or write this host's files; compare large replicas in the same pass.

        Copies are written in the background: `publish` learns the end.

        Raises:
            CheckpointError: On every rank, if a leader cannot copy or write its files, a
                rank cannot hand over its tiles, or replicas that are not made equal differ.
        """
        session, synced = self._session, self._synced
        doing = "staging a local save"
        if not synced.uncompared:
            agree(session.comm, doing, self._pass_once, error=SaveError)
        else:
            synced = compare_beside(
                session.comm, synced, session.options, doing, self._pass_once
            )
            self._level.is_likely_unequal = bool(synced.report.differing)
            self._take(synced)
            if synced.report.differing:
                # Root's bytes have replaced others, which this host may have copied.
                self.drop()
                self.place()
                agree(session.comm, doing, self._pass_once, error=SaveError)
        writer = self._writer
        if writer is not None and session.options.asynchronous:
            self.work = self._workshop.background.submit(lambda: self._write_behind(writer))

    def _pass_once(self) -> list[CapturedState]:
        """Copy or write what this host holds; return the replicas to compare, digested."""
        todo, options = self._synced.uncompared, self._session.options
        writer, placed = self._writer, self._placed
        if writer is None:
            if placed is not None and placed.copies is not None:
                placed.copies.pass_on(None)
            return digest_states(todo, options.io.digest_threads)
        is_mapped = writer.map_files()
        with self._clock.phase("stage"):
            if options.asynchronous:
                writer.stage_tiles(self._level.tile_memory)
            if options.asynchronous or is_mapped:
                writer.stage(self._workshop.arena)
        if not options.asynchronous:
            writer.write(self._clock)
        digested = {one.name: one for one in writer.equal}
        return [digested[one.name] for one in todo]

    def _write_behind(self, writer: ShareWriter) -> None:
        with self._session.watch_behind(self._clock, "saving to hosts"):
            writer.write(self._clock)
            writer.seal(self._clock)

    def publish(self) -> None:
        """Agree on how the writing ended; let each leader name the generation, if well.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        comm, writer, placed = self._session.comm, self._writer, self._placed
        assert placed is not None

        def finish() -> bytes:
            if self.work is not None:
                self.work.result()
            elif writer is not None:
                writer.seal(self._clock)
            return b"" if writer is None else writer.sealed

        def describe(sealed: bytes) -> bytes:
            assert writer is not None
            nbytes = writer.bytes_of(len(self._hosts.names))
            return sealed + nbytes.to_bytes(_LENGTH_BYTES, "big")

        def compare() -> None:
            if writer is not None and writer.sealed != met.message[:DIGEST_BYTES]:
                raise SaveError(
                    f"{comm.name} has written other contents than root: no local "
                    "generation can be made of that"
                )

        def appear() -> None:
            if writer is not None:
                writer.appear()

        try:
            # CRASH: from here on each host has the generation or a leftover of it. A start
            # takes it if the hosts that have it hold all files together.
            met = meet(
                *(comm, "writing a local generation", finish),
                error=SaveError,
                digest=lambda sealed: sealed,
                encode=describe,
            )
            if not met.is_alike:
                agree(comm, "comparing a local generation", compare, error=SaveError)
            agree(comm, "keeping a local generation", appear, error=SaveError)
        except CheckpointError as error:
            self.fail(error)
            return
        self._level.note_kept(placed.origin)
        nbytes = int.from_bytes(met.message[DIGEST_BYTES:], "big")
        self._conclude(placed.origin.number, nbytes)
        self._begin_copy(placed, None if writer is None else writer.manifest)

    def prune(self) -> None:
        """Remove generations beyond those that are kept; report the save. Not collective.

        In the background. Every rank knows by now that all hosts have the new one.
        """
        level, report = self._level, self.report
        kept, home = level.needed, level.home
        is_kept = report is not None and report.generation > 0
        if report is not None and is_kept:
            self._session.observer.note_save(report)
        if is_kept and home is not None and len(level.kept) >= level.local.keep:
            self._workshop.background.submit(lambda: home.keep_only(kept))

    def fail(self, error: CheckpointError) -> None:
        """Give the save up, and report that. Not collective: all ranks have the error.

        Raises:
            CheckpointError: The error, if the ranks can no longer meet.
        """
        self.drop()
        if self._session.comm.is_broken:
            raise error
        self._level.failures += 1
        if self._level.drain is not None and self._is_copied:
            self._level.drain.is_owed = True
        if self._session.comm.is_root:
            _log_failure(self.step, self._level, error)
        self._session.observer.note_failed_local(self.step, self._level.failures, error)
        self._conclude(0, 0)

    def drop(self) -> None:
        """Remove what this host has written. Not collective."""
        if self.work is not None:
            self.work.exception()  # no thread may write while files are removed
        if self._writer is not None:
            self._writer.drop()

    def settled(self) -> SaveReport:
        """Return the report; that of a failure if local saves are switched off."""
        if self.report is None:
            self._conclude(0, 0)
        assert self.report is not None
        return self.report

    def _begin_copy(self, placed: Placed, manifest: Manifest | None) -> None:
        """Begin to copy the generation to the directory, if it is to be. Collective."""
        drain = self._level.drain
        if drain is None:
            return
        drain.note_kept(LocalSource(placed.origin, self.step, manifest))
        if self._is_copied:
            self._workshop.background.join()  # it may still remove old generations
            drain.begin(self._session, self._workshop)

    def _conclude(self, number: int, nbytes: int) -> None:
        """Make the report, and let go of the contents."""
        level = self._level
        self.report = SaveReport(
            generation=number,
            path=self._path_on_root(number),
            step=self.step,
            size=self._session.comm.size,
            bytes_written=nbytes,
            bytes_reused=0,
            seconds=self._clock.seconds(),
            pruned=(),
            sync=self._synced.report,
            level="local",
            survives=level.survived_losses(self._hosts) if number else frozenset(),
            local_failures=level.failures,
        )
        # Otherwise Python's next garbage collection would scan these.
        self._contents = LocalContents((), (), self.step, {})
        self._synced = replace(self._synced, captured=[], uncompared=[])
        self._placed = self._writer = None

    def _path_on_root(self, number: int) -> Path:
        place = self._level.local.place(self._hosts.names[0]) / self._level.folder
        return place / generation_name(number) if number else place


def _log_failure(step: int, level: HostLevel, error: CheckpointError) -> None:
    if level.is_off:
        logger.error(
            "local saves are switched off: %d in a row have failed, the last one at step "
            "%d. The training goes on, and saves to the directory alone: %s",
            *(level.failures, step, error),
        )
    else:
        logger.warning(
            "the local save of step %d has failed (%d in a row), earlier ones are still "
            "there, and the training goes on: %s",
            *(step, level.failures, error),
        )
