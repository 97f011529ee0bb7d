# SPDX-License-Identifier: Apache-2.0
"""A save that root writes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mpi_ckpt.engine.stage import stage
from mpi_ckpt.engine.write import write_generation
from mpi_ckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi_ckpt.engine.draft import Published, SaveRequest
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.stage import LateCopies
    from mpi_ckpt.memory import Arena
    from mpi_ckpt.reports import PhaseClock

__all__ = ["SoloSave"]


class SoloSave:
    """See `mpi_ckpt.engine.saver.SaveWork`.

    Args:
        session: The manager's.
        request: What to save.
        clock: Started when the save was asked for.
    """

    def __init__(self, session: Session, request: SaveRequest, clock: PhaseClock) -> None:
        self._session = session
        self._request = request
        self._clock = clock
        self.published: Published | None = None
        self.writes_here = session.comm.is_root

    def stage(self, arena: Arena) -> LateCopies:
        """Copy what is saved, unless it is a copy. Not collective. On root."""
        if self._request.staged is not None:
            return self._request.staged.late
        staged = stage(arena, self._request.states)
        self._request = replace(self._request, states=staged.states)
        return staged.late

    def write(self) -> None:
        """Write and publish. Not collective. On root, on any thread.

        Raises:
            SaveError: On the calling rank; nothing was published.
        """
        session = self._session
        self.published = write_generation(
            session.directory, self._request, session.options, self._clock
        )

    def conclude(self, written: Callable[[], None]) -> Published | None:
        """Agree on how `write` ended.

        Collective.

        Raises:
            SaveError: On every rank; nothing was published.
        """
        self._session.on_root("saving", written, SaveError)
        return self.published

    def abandon(self) -> None:
        """Nothing was begun yet. Not collective."""
