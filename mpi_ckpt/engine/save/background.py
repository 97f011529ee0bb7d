# SPDX-License-Identifier: Apache-2.0
"""Runs file work on one worker thread, so that the training need not wait. No MPI in it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")

# The training goes first where all cores are busy; a save then takes what it leaves.
_NICENESS = 5

NICENESS_OF_COPIES = 19
"""A copy behind the training has time: it takes next to nothing from a busy core."""


class Background:
    """Runs pieces of file work one after the other. Used from the main thread.

    INVARIANT: its thread never calls MPI. It ends in `close`, or when the last reference to
    this object is gone; the interpreter waits for submitted work at exit.

    Args:
        exit_seconds: How long the interpreter waits at exit.
        give_up: Called after that time: ends the process, which could not end by itself.
            None: waits without a limit.
        stop: Called when the interpreter or the owner ends: the work should end soon. None:
            it is finished.
        niceness: Of the thread, and of the threads that it starts.
    """

    def __init__(
        self,
        exit_seconds: float = 600.0,
        give_up: Callable[[], None] | None = None,
        stop: Callable[[], None] | None = None,
        niceness: int = _NICENESS,
    ) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._futures: list[Future[Any]] = []
        self._exit_seconds = exit_seconds if give_up is not None else None
        self._give_up = give_up
        self._stop = stop
        self._niceness = niceness

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Run work after all work submitted before. Not collective."""
        if self._pool is None:
            _finish_at_exit()
            self._pool = ThreadPoolExecutor(
                1, "mpi_ckpt-save", _give_way, (self._niceness,)
            )
        try:
            future = self._pool.submit(work)
        except RuntimeError:
            # The interpreter is ending and starts no more background work.
            return run_here(work)
        self._futures = [future for future in self._futures if not future.done()]
        self._futures.append(future)
        _UNDER_WAY[future] = (self._exit_seconds, self._give_up, self._stop)
        future.add_done_callback(_forget)
        return future

    def join(self, seconds: float | None = None) -> bool:
        """Wait until no work runs; results and errors stay in the futures. Not collective.

        Args:
            seconds: How long at most; None for no limit.

        Returns:
            Whether no work runs.
        """
        _, self._futures = map(list, wait(self._futures, seconds))
        return not self._futures

    def close(self, seconds: float | None = None) -> bool:
        """Finish the submitted work, and end the thread. Callable twice.

        Args:
            seconds: How long to wait; None for no limit.

        Returns:
            Whether the thread has ended. If not, it ends with its work.
        """
        if self._stop is not None:
            self._stop()
        pool, self._pool = self._pool, None
        ended = self.join(seconds)
        if pool is not None:
            pool.shutdown(wait=ended)
        return ended


# Unfinished work -> how long to wait for it at exit, what to call after that, and before.
_UNDER_WAY: dict[
    Future[Any], tuple[float | None, Callable[[], None] | None, Callable[[], None] | None]
] = {}
os.register_at_fork(after_in_child=_UNDER_WAY.clear)  # the thread is not in the child

_waits_at_exit = False


def _finish_at_exit() -> None:
    """Make the interpreter wait for running work before it ends. Once a process."""
    global _waits_at_exit
    if not _waits_at_exit:
        # Not by `atexit`, which runs too late: once the interpreter joins its threads, no
        # thread pool accepts work, and a save writes through such pools. (Python 3.12.0 and
        # 3.12.1 start no thread even now: there such a save fails with an error.)
        register = getattr(threading, "_register_atexit", atexit.register)
        register(_wait_at_exit)
        _waits_at_exit = True


def _wait_at_exit() -> None:
    for future, (seconds, give_up, stop) in list(_UNDER_WAY.items()):
        if stop is not None:
            stop()
        wait([future], seconds)
        if give_up is not None and not future.done():
            give_up()


def _give_way(niceness: int) -> None:
    """Lower the priority of the calling thread, and of the threads that it starts."""
    if sys.platform == "linux":  # elsewhere priorities are those of whole processes
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def _forget(future: Future[Any]) -> None:
    _UNDER_WAY.pop(future, None)


def run_here(work: Callable[[], Result]) -> Future[Result]:
    """Run work on this thread; return its result or error as a future. Not collective."""
    future: Future[Result] = Future()
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
    return future
