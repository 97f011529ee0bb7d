# SPDX-License-Identifier: Apache-2.0
"""A save that is staged and on its way to disk."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from mpi_ckpt.comm import any_of
from mpi_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import SaveReport

__all__ = ["PendingSave"]


class PendingSave:
    """What an asynchronous `CheckpointManager.save` returns.

    Attributes:
        leave: Not collective: to be called when the ranks will not meet for it any more.

    Main thread only. The manager finishes it by itself at a later ``step()``, ``save()``,
    ``restore()``, ``wait()`` or ``close()``, and raises there what went wrong.

    Args:
        session: The manager's.
        future: The work of this rank; None if it has none.
        conclude: Collective: agrees on how the work ended, given a way to wait for this
            rank's, and makes the report.
        orphaned: Not collective: called with the work once that is done, on any thread, if
            the ranks do not conclude: nobody will ask any more.
    """

    def __init__(
        self,
        session: Session,
        future: Future[None] | None,
        conclude: Callable[[Callable[[], None]], SaveReport],
        orphaned: Callable[[Future[None]], None],
    ) -> None:
        self._session = session
        self._future = future
        self._conclude = conclude
        self._error: CheckpointError | None = None
        self.report: SaveReport | None = None
        # Also when nobody holds this any more, and when the interpreter ends.
        self.leave = weakref.finalize(self, _leave, future, orphaned)

    @property
    def finished(self) -> bool:
        """Whether every rank has heard how the save ended. Not collective."""
        return self.report is not None or self._error is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's work is still going on. Not collective."""
        return self._future is not None and not self._future.done()

    def done(self) -> bool:
        """Tell whether `wait` would return at once.

        Collective. Costs one allreduce of a byte.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        if self.finished:
            return True
        (writing,) = any_of(self._session.comm, "done()", self.is_writing)
        return not writing

    def wait(self) -> SaveReport:
        """Wait until the save is durable, or has failed.

        Collective. Callable again; it then gives or raises the same.

        Raises:
            SaveError: On every rank, if it failed; nothing was published.
        """
        if self._error is not None:
            raise self._error
        if self.report is None:
            self.report = self._finish()
        return self.report

    def _finish(self) -> SaveReport:
        def written() -> None:
            if self._future is not None:
                self._future.result()

        try:
            report = self._conclude(written)
        except CheckpointError as error:
            self._error = error
            if not self._session.comm.is_broken:
                self.leave.detach()
            raise
        self.leave.detach()
        return report


def _leave(future: Future[None] | None, orphaned: Callable[[Future[None]], None]) -> None:
    if future is not None:
        future.add_done_callback(orphaned)
