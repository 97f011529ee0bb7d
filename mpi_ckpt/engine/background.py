# SPDX-License-Identifier: Apache-2.0
"""One worker thread on root, for what need not hold up the training. No MPI in it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

__all__ = ["Background"]

Result = TypeVar("Result")


class Background:
    """Runs file work one piece after the other. Used from the main thread.

    INVARIANT: its thread never calls MPI. It ends in `close`; at interpreter exit Python
    waits for what was submitted.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._futures: list[Future[object]] = []

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Run work after all that was submitted before. Not collective."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "mpi_ckpt-save")
        future = self._pool.submit(work)
        self._futures = [one for one in self._futures if not one.done()]
        self._futures.append(future)  # type: ignore[arg-type]  # only waited for
        return future

    def join(self) -> None:
        """Wait until nothing runs; outcomes stay with their futures. Not collective."""
        wait(self._futures)
        self._futures = []

    def close(self) -> None:
        """Finish what was submitted, and end the thread. Callable twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        self._futures = []
