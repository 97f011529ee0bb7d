# SPDX-License-Identifier: Apache-2.0
"""Writes a generation by root alone, which may publish it later. No MPI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.engine.save.draft import Draft

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mpi_ckpt.engine.save.request import Published, SaveRequest
    from mpi_ckpt.engine.save.shard import ShardImage
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.reports import PhaseClock


class LoneWrite:
    """A generation that root alone writes. Not collective. On any thread.

    Args:
        session: The manager's.
        clock: The save's.
    """

    def __init__(self, session: Session, clock: PhaseClock) -> None:
        self._session = session
        self._clock = clock
        self._draft: Draft | None = None

    def write(self, request: SaveRequest, image: ShardImage | None) -> None:
        """Write all files but the manifest.

        Args:
            request: What to save.
            image: As for `write_shard`.

        Raises:
            SaveError: On the calling rank; no files are left behind.
        """
        session = self._session
        with self._clock.phase("write"):
            draft = Draft.begin(session.directory, request, session.options)
            draft.partial.progress = self._clock.progress
            try:
                draft.write(draft.fresh_states, request.plain, image)
            except BaseException:
                draft.drop()
                raise
        self._draft = draft

    def digested(self, states: Iterable[CapturedState]) -> list[CapturedState]:
        """Return some of the written states with their digests."""
        assert self._draft is not None
        found = {one.name: one for one in self._draft.digested()}
        return [found[one.name] for one in states]

    def publish(self) -> Published:
        """Make the generation exist.

        Raises:
            SaveError: On the calling rank; nothing was published.
        """
        draft, self._draft = self._draft, None
        assert draft is not None
        with draft, self._clock.phase("publish"):
            return draft.publish()

    def drop(self) -> None:
        """Remove the files, unless they are being written or published."""
        if self._draft is not None:
            self._draft.drop()
