# SPDX-License-Identifier: Apache-2.0
"""Copies what hosts keep to the checkpoint directory behind the training, one at a time.

The hosts copy while the training goes on. At the step after all have, the ranks agree on
how that went, and root publishes. A try that fails is repeated after a pause, of what is
the newest generation on the hosts by then.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import agree, on_root
from mpi_ckpt.engine.hosts.copying.directory_copy import DirectoryCopy
from mpi_ckpt.engine.hosts.copying.token_bucket import Stopped, TokenBucket
from mpi_ckpt.engine.hosts.kept import set_aside_bad
from mpi_ckpt.engine.save.request import Published, make_report
from mpi_ckpt.errors import (
    CheckpointError,
    CorruptGenerationError,
    FencedError,
    ReadError,
    SaveError,
)
from mpi_ckpt.reports import SyncReport

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mpi_ckpt.engine.hosts.copying.directory_copy import LocalSource
    from mpi_ckpt.engine.save.saver import Workshop
    from mpi_ckpt.engine.session import Session

logger = logging.getLogger(__name__)

_PAUSES_SECONDS = (10.0, 60.0)
"""Between the tries: the first of three, and the second."""


class Drain:
    """The copies of one manager. Main thread only. The same on every rank, if not said.

    Args:
        rate: Bytes per second that all hosts together may copy.

    Attributes:
        is_wanted: Whether the next local save is to be copied.
        is_owed: Whether a save to the directory is owed: hosts could not keep what was to
            be copied.
        turn: Number of the tries so far.
        step: The training step.
        skipped: Due saves that were left out since the last copy, as one was under way.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self.is_wanted = False
        self.is_owed = False
        self.turn = 0
        self.step = 0
        self.skipped = 0
        self._newest: LocalSource | None = None
        self._copy: DirectoryCopy | None = None
        self._bucket: TokenBucket | None = None
        self._work: Future[None] | None = None
        self._tries = 0
        self._is_pausing = self._is_stopped = False
        self._try_at = 0.0
        self._began_at = 0.0
        self._failure: SaveError | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a copy is under way, or will be tried again. Not collective."""
        return self.is_under_way or self._is_pausing

    @property
    def is_under_way(self) -> bool:
        """Whether a copy is under way. Not collective."""
        return self._copy is not None

    @property
    def is_copying(self) -> bool:
        """Whether this rank still copies. Not collective; each rank has its own."""
        return self._work is not None and not self._work.done()

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not copy. Not collective; each rank has its own."""
        work = self._work
        return work is not None and work.done() and work.exception() is not None

    @property
    def must_try(self) -> bool:
        """Whether a pause is over by this rank's clock; root's decides. Not collective."""
        return self._is_pausing and time.monotonic() >= self._try_at

    @property
    def needed(self) -> tuple[int, ...]:
        """The local generations that must stay, besides those kept. Not collective."""
        return () if self._copy is None else (self._copy.source.origin.number,)

    def progress(self) -> dict[str, float] | None:
        """Return how far the copy is, for people.

        Not collective; each rank has its own. On any thread.

        Returns:
            ``step`` and ``since`` (the time) of its beginning, ``bytes_done`` of the
            ``bytes_expected`` of this rank, ``lag`` in steps, due saves ``skipped``
            meanwhile, and ``failed`` tries; None if no copy is under way.
        """
        copy, source = self._copy, self._newest
        if not self.is_busy or source is None:
            return None
        source = source if copy is None else copy.source
        return {
            "step": source.step,
            "since": time.time() - (time.perf_counter() - self._began_at),
            "bytes_done": 0 if copy is None else copy.progress.moved,
            "bytes_expected": 0 if copy is None else copy.nbytes,
            "lag": max(0, self.step - source.step),
            "skipped": self.skipped,
            "failed": self._tries - (copy is not None),
        }

    def take_wish(self) -> bool:
        """Return whether the local save that begins is to be copied. Not collective."""
        wanted, self.is_wanted = self.is_wanted, False
        return wanted

    def note_kept(self, source: LocalSource) -> None:
        """Note the newest generation that hosts keep. Not collective."""
        self._newest = source

    def note_written(self) -> None:
        """Note that a save is written to the directory itself. Not collective."""
        self.is_wanted = self.is_owed = False
        self.skipped = 0

    def note_skipped(self, session: Session, step: int) -> None:
        """Note that a due save is left out, as a copy is under way. Not collective."""
        self.skipped += 1
        source = self._newest if self._copy is None else self._copy.source
        if session.comm.is_root and source is not None:
            logger.info(
                "the save to the directory due at step %d is left out, since the copy of "
                "step %d is still under way after %.0f s; %d left out so far",
                *(step, source.step, time.perf_counter() - self._began_at, self.skipped),
            )

    def begin(self, session: Session, workshop: Workshop) -> None:
        """Begin to copy the newest generation that hosts keep.

        Collective. A failure is noted, not raised.

        Raises:
            FencedError: On every rank, if another job has taken over the directory.
            CollectiveError: On every live rank, if one never arrives.
        """
        assert self._newest is not None
        if self._tries == 0:
            self._began_at = time.perf_counter()
        self.turn += 1
        self._tries += 1
        self._is_pausing = self._is_stopped = False
        copy = DirectoryCopy(session, self._newest)
        try:
            copy.begin()
        except CheckpointError as error:
            self._note_failure(session, self._newest, error)
            return
        self._copy = copy
        if copy.nbytes:
            self._bucket = bucket = TokenBucket(self._rate * copy.share)
            self._work = workshop.copying.submit(lambda: copy.copy(bucket))

    def go_on(self, session: Session, workshop: Workshop) -> None:
        """Publish what all ranks have copied, or try again. Collective. Raises as `begin`.

        Waits for ranks that still copy.
        """
        copy = self._copy
        if copy is None:
            self.begin(session, workshop)
            return
        comm = session.comm

        def publish() -> dict[str, Any]:
            return _publish(session, copy, time.perf_counter() - self._began_at)

        try:
            agree(comm, "copying a local generation", self._await_work, error=SaveError)
            if self._is_stopped:
                raise SaveError("the copy was stopped")
            facts = on_root(comm, "publishing", publish, error=SaveError)
        except CheckpointError as error:
            self.stop()  # without effect, unless the ranks could not even meet
            self._drop()
            self._give_up_try(session, workshop, copy.source, error)
            return
        self._forget()
        self._conclude(session, workshop, copy.source, facts)

    def finish(self, session: Session, workshop: Workshop) -> None:
        """Return once no copy is under way, copying as fast as can be.

        Collective.

        Raises:
            SaveError: On every rank, if one has failed for good.
            CollectiveError: On every live rank, if one never arrives.
        """
        while self.is_busy:
            if self._bucket is not None:
                self._bucket.open()
            self.go_on(session, workshop)
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise, once, what made a copy fail for good. Not collective.

        Raises:
            SaveError: On every rank that calls.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def give_up(self, session: Session) -> None:
        """Give up the copy that is under way, or due: a newer save takes its place.

        Collective.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        if self._copy is not None:
            self.stop()
            agree(session.comm, "giving up a copy", self._await_end, error=SaveError)
            self._drop()
        self._tries, self._failure = 0, None
        self._is_pausing = self.is_wanted = False

    def stop(self) -> None:
        """Let this rank copy nothing more. Not collective.

        The ranks cannot publish what was copied then.
        """
        self._is_stopped = True
        if self._bucket is not None:
            self._bucket.stop()

    def _await_work(self) -> None:
        if self._work is not None:
            with suppress(Stopped):
                self._work.result()

    def _await_end(self) -> None:
        if self._work is not None:
            self._work.exception()  # it does not matter any more

    def _drop(self) -> None:
        """Remove what was copied. No rank still copies: all have agreed on the outcome."""
        if self._copy is not None:
            self._copy.drop()
        self._forget()

    def _forget(self) -> None:
        self._copy = self._bucket = self._work = None

    def _give_up_try(
        self,
        session: Session,
        workshop: Workshop,
        source: LocalSource,
        error: CheckpointError,
    ) -> None:
        """Try again at once if a bad copy was set aside; else note the failure."""
        number, is_broken = source.origin.number, session.comm.is_broken
        if (
            isinstance(error, CorruptGenerationError | ReadError)
            and not is_broken
            and set_aside_bad(session, number, error)
        ):
            self._tries -= 1  # another host has a copy
            self.begin(session, workshop)
            return
        self._note_failure(session, source, error)

    def _note_failure(
        self, session: Session, source: LocalSource, error: CheckpointError
    ) -> None:
        root, tries = session.directory.root, self._tries
        is_last = tries > len(_PAUSES_SECONDS)
        if session.comm.is_broken or isinstance(error, FencedError):
            self._tries = 0
            raise error
        what = f"copying step {source.step} from the hosts to {root}"
        if not is_last:
            pause = _PAUSES_SECONDS[tries - 1]
            self._is_pausing, self._try_at = True, time.monotonic() + pause
            if session.comm.is_root:
                text = "%s has failed, and is tried again in %.0f s: %s"
                logger.warning(text, what, pause, error)
            return
        self._tries = 0
        self._failure = SaveError(
            f"{what} has failed {tries} times, the last time because of: {error}. What the "
            "hosts keep is still there, and `mpi-ckpt rescue` copies it once that works"
        )
        self._failure.__cause__ = error
        if session.comm.is_root:
            logger.error("%s; the next save raises this error", self._failure)

    def _conclude(
        self,
        session: Session,
        workshop: Workshop,
        source: LocalSource,
        facts: dict[str, Any],
    ) -> None:
        """Report the generation; remove what retention gives up."""
        level, comm = session.hosts, session.comm
        report = replace(
            make_report(facts, source.step, comm.size, facts["seconds"], SyncReport()),
            copied_from=source.origin.number,
            lag=max(0, self.step - source.step),
            skipped=self.skipped,
        )
        self._tries = self.skipped = 0
        if level is not None and level.origin == source.origin:
            level.note_published(report.generation)  # hosts have nothing newer
        workshop.durations.note_copied(report.seconds["total"])
        session.note("saved", source.step)
        session.observer.note_save(report)
        if comm.is_root and report.pruned:
            remove, retired = session.directory.remove, report.pruned
            workshop.background.submit(lambda: remove(retired))


def _publish(session: Session, copy: DirectoryCopy, seconds: float) -> dict[str, Any]:
    """Publish a copy on root; return what every rank reports."""
    start = time.perf_counter()
    manifest, path, nbytes = copy.publish()
    catalog = session.directory.catalog
    retired = catalog.choose(session.options.retention)
    published = Published(
        generation=manifest.generation,
        path=path,
        bytes_written=nbytes + sum(file.nbytes for file in manifest.files),
        bytes_reused=0,
        retired=retired,
        kept=catalog.count - len(retired),
        metrics=manifest.metrics,
    )
    spent = time.perf_counter() - start
    times = {"copy": seconds, "publish": spent, "total": seconds + spent}
    return published.to_json() | {"seconds": times}
