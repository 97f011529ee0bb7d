# SPDX-License-Identifier: Apache-2.0
"""Represents a save that is staged and is being written."""

from __future__ import annotations

import logging
import weakref
from functools import partial
from typing import TYPE_CHECKING, Protocol

from mpi_ckpt.comm import any_of
from mpi_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.save.request import Published
    from mpi_ckpt.reports import SaveReport

__all__ = ["PendingSave"]

logger = logging.getLogger(__name__)


class LeftSave(Protocol):
    """What a pending save needs of the save, whichever level it goes to."""

    step: int
    work: Future[None] | None
    published: Published | None
    report: SaveReport | None

    def publish(self) -> None:
        """Agree on how the writing ended. Collective."""

    def prune(self) -> None:
        """Remove what the save replaces. Not collective."""


class PendingSave:
    """The result of an asynchronous `CheckpointManager.save`.

    Main thread only. The manager finishes it by itself at a later ``step()``, ``save()``,
    ``restore()``, ``wait()`` or ``close()``, and raises its error there.

    Args:
        comm: The manager's communicator.
        save: The save; its writing has begun.
        level: Where it saves to: ``"directory"`` or ``"local"``.

    Attributes:
        leave: Not collective: call it if the ranks will no longer meet for the save.
    """

    def __init__(
        self, comm: Communicator, save: LeftSave, level: str = "directory"
    ) -> None:
        self.level = level
        self._comm = comm
        self._save = save
        self._error: CheckpointError | None = None
        # Also after the last reference to this is gone, and when the interpreter ends.
        log_end = partial(_log_end, save, comm.is_root)
        self.leave = weakref.finalize(self, _leave, save.work, log_end)

    @property
    def report(self) -> SaveReport | None:
        """The report; None until the save was acknowledged. Not collective."""
        return self._save.report

    @property
    def finished(self) -> bool:
        """Whether every rank knows how the save ended. Not collective."""
        return self.report is not None or self._error is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's work is still going on. Not collective."""
        work = self._save.work
        return work is not None and not work.done()

    def done(self) -> bool:
        """Return whether `wait` would return at once.

        Collective. Durations one allreduce of 56 bytes.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        if self.finished:
            return True
        (writing,) = any_of(self._comm, "done()", self.is_writing)
        return not writing

    def wait(self) -> SaveReport:
        """Wait until the save is durable, or has failed.

        Collective. Callable again; it then gives or raises the same.

        Raises:
            SaveError: On every rank, if it failed; nothing was published.
        """
        if self._error is not None:
            raise self._error
        if self._save.report is None:
            self._finish()
        assert self._save.report is not None
        return self._save.report

    def _finish(self) -> None:
        try:
            self._save.publish()
        except CheckpointError as error:
            self._error = error
            if not self._comm.is_broken:
                self.leave.detach()
            raise
        self.leave.detach()
        self._save.prune()


def _leave(work: Future[None] | None, log_end: partial[None]) -> None:
    if work is not None:
        work.add_done_callback(log_end)


def _log_end(save: LeftSave, is_root: bool, work: Future[None]) -> None:
    """Log how a save ended if the ranks did not meet for it again."""
    if not is_root:
        return
    left = f"the save of step {save.step} was left without wait() or close()"
    failure = work.exception()
    if failure is not None:
        logger.error("%s and has failed; nothing was published: %s", left, failure)
    elif save.published is not None:
        logger.warning("%s; generation %d is durable", left, save.published.generation)
    else:
        logger.warning(
            "%s and is given up: only all ranks together can publish what several ranks "
            "write; the next start removes its files",
            left,
        )
