# SPDX-License-Identifier: Apache-2.0
"""Ends the whole job when one rank leaves it by an error of the program.

Under plain ``python`` that rank would wait in MPI_Finalize for the others, and they for
it. What every rank leaves by, such as an error of this package, needs no such end.

``sys.excepthook`` belongs to the process, so what is armed is a list of the process.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import traceback
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from mpi_ckpt.comm import Farewell, abort_job, is_rank_failure
from mpi_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

    from mpi_ckpt.comm import Communicator

__all__ = ["AbortOnError"]

logger = logging.getLogger(__name__)

# Ranks that fail by the same error do so within moments.
_ERROR_SECONDS = 3.0
# Who leaves by sys.exit() may have been told to; some ranks take longer to tidy up.
_EXIT_SECONDS = 30.0
_INTERRUPTED = 130
"""What a shell reports of a process that was interrupted."""


class AbortOnError:
    """While armed, an exception that nobody catches on this rank alone ends the job.

    Not collective. Main thread only. Without effect in a job of one rank, at an
    interactive prompt, and under ``python -m mpi4py``, which does the same.

    Args:
        comm: The manager's communicator.
        settle: Lets a pending save of this rank come to its end, for a limited time. Held
            weakly.
        how: As `Options.abort_on_error`: whether to do anything.
    """

    def __init__(self, comm: Communicator, settle: Callable[[], object], how: bool) -> None:
        self.comm = comm
        self.exit_code = 0
        self._farewell: Farewell | None = None
        self._settle = weakref.WeakMethod(settle)
        self._enabled = how and comm.size > 1 and "mpi4py.run" not in sys.modules

    def arm(self) -> None:
        """Watch from now on. Not collective. Callable twice."""
        if self._enabled and self not in _HOOK.armed:
            _HOOK.armed.append(self)
            _HOOK.install()

    def disarm(self) -> None:
        """Watch no more, unless ranks are missing: MPI_Finalize would wait for them.

        Not collective. Callable twice.
        """
        if self in _HOOK.armed and not self.comm.is_broken:
            _HOOK.armed.remove(self)
        if not _HOOK.armed:
            _HOOK.uninstall()

    def note(self, error: BaseException, *, expected: int) -> None:
        """Hear that the manager is left by an exception. Not collective.

        It may be caught further up, so nothing is done yet. But ``sys.exit`` passes no
        hook: that it was called is known here only. And who has a save to end before it
        can leave must not be thought to stay.

        Args:
            error: The exception.
            expected: The exit code that all ranks have agreed to leave with; 0 for none.
        """
        # A lost rank may be recovered from further up: then nobody leaves.
        if self not in _HOOK.armed or is_rank_failure(error):
            return
        self._say_farewell()
        code = _code_of(error) if isinstance(error, SystemExit) else 0
        self.exit_code = 0 if code == expected else code

    def leave(self) -> None:
        """Say farewell, and let a pending save of this rank end. Not collective."""
        # In this order: a save takes longer than the others wait.
        self._say_farewell()
        settle = self._settle()
        if settle is not None:
            settle()

    def is_alone(self, seconds: float) -> bool:
        """Wait for the others to leave as well; tell whether any stays. Not collective."""
        try:
            return self._farewell is None or bool(self._farewell.missing(seconds))
        except Exception:
            logger.exception("how the other ranks fare cannot be found out")
            return True

    def _say_farewell(self) -> None:
        if self._farewell is None:
            try:
                self._farewell = Farewell(self.comm)
            except Exception:  # MPI may be what has failed
                logger.exception("the other ranks cannot be told that this one leaves")


class _Hook:
    """The one ``sys.excepthook`` of the process, and what is done at its exit."""

    def __init__(self) -> None:
        self.armed: list[AbortOnError] = []
        self._previous = sys.excepthook
        self._owner = 0

    def install(self) -> None:
        self._owner = os.getpid()
        if sys.excepthook != self.uncaught:
            self._previous, sys.excepthook = sys.excepthook, self.uncaught
            atexit.register(self.at_exit)

    def uninstall(self) -> None:
        atexit.unregister(self.at_exit)
        # Somebody who took it after us keeps it, and finds nothing armed here.
        if sys.excepthook == self.uncaught:
            sys.excepthook = self._previous

    def uncaught(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        armed = [] if _is_printed_only() else self._in_reach()
        if not armed:
            self._previous(kind, error, trace)
            return
        self._tell(armed[0].comm, kind, error, trace)
        if is_rank_failure(error):  # nobody can take leave of the dead
            _abort(armed[0].comm, 1)
        for one in armed:
            one.leave()
        if any(one.is_alone(_ERROR_SECONDS) for one in armed):
            _abort(armed[0].comm, _INTERRUPTED if kind is KeyboardInterrupt else 1)
        self.armed.clear()

    def at_exit(self) -> None:
        armed = self._in_reach()
        for one in armed:
            one.leave()
        for one in armed:
            # Nobody can leave while a rank that missed a deadline stays where it is.
            code = one.exit_code or int(one.comm.is_broken)
            if code and one.is_alone(_EXIT_SECONDS):
                _abort(one.comm, code)

    def _in_reach(self) -> list[AbortOnError]:
        # A forked process has no part in MPI.
        if os.getpid() != self._owner:
            return []
        return [one for one in self.armed if one.comm.is_open]

    def _tell(
        self,
        comm: Communicator,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        name = comm.name
        if isinstance(error, CheckpointError) and error.failures:
            first = error.failures[0].rank
            if comm.rank not in (comm.root, first):
                # Every rank has this error: a thousand times the same text helps nobody.
                _write(f"{name}: {kind.__name__}, as told by rank {first}\n")
                return
        if self._previous is not sys.__excepthook__:
            _write(f"{name}:\n")
            self._previous(kind, error, trace)
            return
        # At once, so that lines of other ranks do not come between.
        lines = traceback.format_exception(kind, error, trace)
        _write("".join([f"{name}:\n", *lines]))


_HOOK = _Hook()


def _is_printed_only() -> bool:
    """Tell whether the program goes on: the hook was called by hand, or at a prompt."""
    prompt = sys.flags.interactive or hasattr(sys, "ps1")
    if prompt or threading.current_thread() is not threading.main_thread():
        return True
    # Python itself calls the hook when no frame of the program is left.
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 (as `inspect` has it)
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return frame is not None


def _abort(comm: Communicator, code: int) -> None:
    _write(
        f"{comm.name}: this rank leaves the job by an error and others do not; they would "
        f"wait for one another without end, so the job is aborted with code {code}\n"
    )
    abort_job(code)


def _code_of(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    return leaving.code if isinstance(leaving.code, int) else 1


def _write(text: str) -> None:
    # Nothing that goes wrong here may keep the job from its end.
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()
