# SPDX-License-Identifier: Apache-2.0
"""Carries a save out on root: at once, or behind the training's back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mpi_ckpt.engine.background import Background
from mpi_ckpt.engine.pending import PendingSave
from mpi_ckpt.engine.report import report_save
from mpi_ckpt.engine.stage import Arena, stage
from mpi_ckpt.engine.write import SaveRequest, write_generation
from mpi_ckpt.errors import SaveError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.write import Published
    from mpi_ckpt.reports import PhaseClock, SaveReport, SyncReport

__all__ = ["Saver"]


class Saver:
    """Writes, publishes, acknowledges and prunes; knows what is under way.

    Main thread only. The directory is root's background thread's while that works, so
    everything that touches it calls `finish` first.

    Args:
        session: The manager's.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._arena = Arena()
        self._background = Background()
        self.pending: PendingSave | None = None

    @property
    def has_written(self) -> bool:
        """Whether root's thread is through with the pending save. Not collective."""
        return self.pending is not None and self.pending.written

    def save(
        self, request: SaveRequest, synced: SyncReport, clock: PhaseClock
    ) -> SaveReport | PendingSave:
        """Save what is asked for, in the way the options say.

        Collective. Nothing is pending.

        Args:
            request: What to save.
            synced: What the sync did, for the report.
            clock: Started when the save was asked for.

        Raises:
            SaveError: On every rank; nothing was published.
        """

        def acknowledge(published: Published | None) -> SaveReport:
            return self._acknowledge(published, request, synced, clock)

        if self._session.options.asynchronous:
            future = self._session.on_root(
                "staging a save", lambda: self._submit(request, clock), SaveError
            )
            self.pending = PendingSave(self._session, future, acknowledge)
            return self.pending
        published = self._session.on_root(
            "saving", lambda: self._write(request, clock), SaveError
        )
        return acknowledge(published)

    def finish(self) -> None:
        """End what is under way; root's thread is idle after.

        Collective.

        Raises:
            SaveError: On every rank, if the pending save failed.
        """
        pending, self.pending = self.pending, None
        try:
            if pending is not None and not pending.finished:
                pending.wait()
        finally:
            self._background.join()  # not collective

    def close(self) -> None:
        """Let root's thread finish, and give back its memory. Not collective."""
        self._background.close()
        self._arena.close()

    def _submit(self, request: SaveRequest, clock: PhaseClock) -> Future[Published]:
        with clock.phase("stage"):
            staged = replace(request, states=stage(self._arena, request.states))
        return self._background.submit(lambda: self._write(staged, clock))

    def _write(self, request: SaveRequest, clock: PhaseClock) -> Published:
        session = self._session
        return write_generation(session.directory, request, session.options, clock)

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
        # Every rank has heard by now that the new generation is durable: what it
        # replaces may go, and nobody needs to wait for that.
        if published is not None and published.retired:
            directory, retired = self._session.directory, published.retired
            self._background.submit(
                lambda: directory.catalog.remove(retired, directory.job)
            )
        return report
