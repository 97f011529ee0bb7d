# SPDX-License-Identifier: Apache-2.0
"""A save that is staged and on its way to disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.comm import any_of
from mpi_ckpt.errors import CheckpointError, SaveError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.write import Published
    from mpi_ckpt.reports import SaveReport

__all__ = ["PendingSave"]


class PendingSave:
    """What an asynchronous `CheckpointManager.save` returns.

    Main thread only. The manager finishes it by itself at a later ``step()``, ``save()``,
    ``restore()``, ``wait()`` or ``close()``, and raises there what went wrong.

    Args:
        session: The manager's.
        future: The work on root; None elsewhere.
        acknowledge: Called on every rank when the save is durable; makes the report.
    """

    def __init__(
        self,
        session: Session,
        future: Future[Published] | None,
        acknowledge: Callable[[Published | None], SaveReport],
    ) -> None:
        self._session = session
        self._future = future
        self._acknowledge = acknowledge
        self._error: CheckpointError | None = None
        self.report: SaveReport | None = None

    @property
    def finished(self) -> bool:
        """Whether every rank has heard how the save ended. Not collective."""
        return self.report is not None or self._error is not None

    @property
    def written(self) -> bool:
        """Whether root's work is over, as far as this rank knows. Not collective."""
        return self._future is not None and self._future.done()

    def done(self) -> bool:
        """Tell whether `wait` would return at once.

        Collective. Costs one allreduce of a byte.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        if self.finished:
            return True
        (done,) = any_of(self._session.comm, "done()", self.written)
        return done

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
        def result() -> Published:
            assert self._future is not None  # this is root
            return self._future.result()

        try:
            published = self._session.on_root("saving", result, SaveError)
        except CheckpointError as error:
            self._error = error
            raise
        return self._acknowledge(published)
