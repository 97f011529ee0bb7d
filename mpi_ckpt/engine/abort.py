# SPDX-License-Identifier: Apache-2.0
"""Ends the whole job when one rank alone fails by an uncaught exception.

Under plain ``python`` that rank would wait in MPI_Finalize for the others, and they for it.
An error that every rank leaves by, such as one of this package, does not abort the job.

``sys.excepthook`` belongs to the process, so the armed instances are one list for the
process.
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
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.comm import (
    Farewell,
    abort_job,
    is_mpi_running,
    is_rank_failure,
    member_of,
)
from mpi_ckpt.errors import CheckpointError, Printing
from mpi_ckpt.failures import RemoteTraceback
from mpi_ckpt.leaves.digest import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType, TracebackType

    from mpi_ckpt.comm import Communicator, Member
    from mpi_ckpt.options import AbortOn

logger = logging.getLogger(__name__)


_LINES_MAX = 20
_FRAMES_MAX = 4
_LEVELS_MAX = 3
_PACKAGE = str(Path(__file__).parents[1])
_LED_TO = "which led to:\n"


def in_full(error: BaseException) -> str:
    """Return the text of an exception as Python prints it.

    Not collective. If an error of this package would take more than 20 lines, its traceback
    shows the frames of the program, but not those of this package.

    Args:
        error: The exception, with its traceback.
    """
    text = "".join(traceback.format_exception(error))
    if text.count("\n") <= _LINES_MAX or not isinstance(error, CheckpointError):
        return text
    levels = list(_chain(error))
    parts = [_LED_TO.join(_level(level, is_last=level is error) for level in levels)]
    return "".join(["Traceback, without the frames of mpi_ckpt:\n", *parts])


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the chain of an exception, first cause first, itself last."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        hidden = cause.__suppress_context__ or cause.__cause__ is not None
        cause = cause.__cause__ if hidden else cause.__context__
    # Another rank prints its own traceback.
    causes = [cause for cause in chain[:0:-1] if not isinstance(cause, RemoteTraceback)]
    yield from [*causes[: _LEVELS_MAX - 1], error]


def _level(error: BaseException, *, is_last: bool) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_PACKAGE)
    ]
    half = _FRAMES_MAX // 2
    if len(frames) > _FRAMES_MAX:
        frames = frames[:half] + frames[-half:]
    places = [
        f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n'
        + (f"    {frame.line}\n" if frame.line else "")
        for frame in frames
    ]
    headline = "".join(traceback.format_exception_only(error))
    if not is_last:
        headline = headline.split("\n")[0] + "\n"
    return "".join([*places, headline])


# Ranks that fail by the same error fail almost at the same time.
_ERROR_SECONDS = 3.0
# A request may make all ranks call sys.exit(); some ranks take longer to clean up.
_EXIT_SECONDS = 30.0
_INTERRUPTED = 130
"""What a shell reports of a process that was interrupted."""


class AbortOnError:
    """While armed, ends the job on an uncaught exception on this rank alone.

    Not collective. Main thread only. Without effect in a job of one rank, at an
    interactive prompt, and under ``python -m mpi4py``, which does the same.

    Args:
        comm: The manager's communicator.
        settle: Waits for a pending save of this rank, for a limited time. Held weakly.
        how: Value of `Options.abort_on_error`.
    """

    def __init__(
        self, comm: Communicator, settle: Callable[[], object], how: AbortOn
    ) -> None:
        self.comm = comm
        self.exit_code = 0
        self._farewell: Farewell | None = None
        self._settle = weakref.WeakMethod(settle)
        self.member = member_of(comm, how)
        peers = comm.size > 1 or self.member is not None
        self._enabled = bool(how) and peers and "mpi4py.run" not in sys.modules

    @property
    def name(self) -> str:
        """The name of this rank, which heads its errors."""
        name = self.comm.name
        return name if self.member is None else f"{name}, {self.member.name}"

    def arm(self) -> None:
        """Start to watch. Not collective. Callable twice."""
        if self._enabled and self not in _HOOK.armed:
            _HOOK.armed.append(self)
            _HOOK.install()
            # Also when this manager is closed: others may fail later.
            _HOOK.member = self.member or _HOOK.member

    def disarm(self) -> None:
        """Stop watching, unless ranks are missing: MPI_Finalize would wait for them.

        Not collective. Callable twice.
        """
        if self in _HOOK.armed and not self.comm.is_broken:
            _HOOK.armed.remove(self)
        if not _HOOK.armed:
            _HOOK.uninstall()

    def note(self, error: BaseException, *, expected: int) -> None:
        """Note that an exception leaves the manager's ``with`` block. Not collective.

        The caller may catch it, so nothing happens yet. But ``sys.exit`` calls no hook:
        only this method sees it. And the other ranks must not think that a rank stays while
        it finishes a save before it leaves.

        Args:
            error: The exception.
            expected: The exit code that all ranks have agreed to leave with; 0 for none.
        """
        # The caller may recover from a lost rank: then no rank leaves.
        if self not in _HOOK.armed or is_rank_failure(error):
            return
        self._say_farewell(error)
        code = _code_of(error) if isinstance(error, SystemExit) else 0
        self.exit_code = 0 if code == expected else code

    def is_printed_by_root(self, error: BaseException) -> bool:
        """Send the farewell with an error; return whether root leaves by the same error.

        Not collective. Ranks may raise the same error without an agreement.

        Args:
            error: The uncaught exception of this rank.
        """
        self._say_farewell(error)
        if self._farewell is None or self.comm.is_root:
            return False
        try:
            said = self._farewell.words_of_root(_ERROR_SECONDS)
        except Exception as failure:
            if not is_rank_failure(failure):  # else it may be root that is lost
                logger.exception("the error by which root leaves cannot be received")
            return False
        return said == _words_of(error)

    def leave(self, error: BaseException | None = None) -> None:
        """Send the farewell, and wait for a pending save of this rank. Not collective.

        Args:
            error: The uncaught exception; None if there is none.
        """
        # In this order: a save takes longer than the others wait.
        self._say_farewell(error)
        settle = self._settle()
        if settle is not None:
            settle()

    def is_alone(self, seconds: float) -> bool:
        """Wait for the others to leave too; return whether any stays. Not collective."""
        try:
            return self._farewell is None or bool(self._farewell.missing(seconds))
        except Exception:
            logger.exception("it cannot be found out whether the other ranks leave")
            return True

    def _say_farewell(self, error: BaseException | None) -> None:
        if self._farewell is None:
            try:
                self._farewell = Farewell(self.comm, _words_of(error))
            except Exception:  # MPI may be what has failed
                logger.exception("the other ranks cannot be notified that this rank leaves")


class _Hook:
    """The one ``sys.excepthook`` of the process, and the work at its exit."""

    def __init__(self) -> None:
        self.armed: list[AbortOnError] = []
        self.member: Member | None = None
        # Another hook may stand between two of these, and call ours in turn.
        self._replaced: list[Callable[..., object]] = []
        self._depth = 0
        self._owner = 0

    def install(self) -> None:
        self._owner = os.getpid()
        if sys.excepthook != self.uncaught:
            self._replaced.append(sys.excepthook)
            sys.excepthook = self.uncaught
            atexit.unregister(self.at_exit)
            atexit.register(self.at_exit)

    def uninstall(self) -> None:
        if self.member is None:
            atexit.unregister(self.at_exit)
        # If other code replaced the hook later, its hook stays; it finds nothing armed
        # here.
        if sys.excepthook == self.uncaught:
            sys.excepthook = self._replaced.pop()

    def uncaught(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        if self._depth:
            self._call_replaced(kind, error, trace)
            return
        is_printed_only = _is_printed_only()
        armed = [] if is_printed_only else self._in_reach()
        if not armed:
            # A manager whose creation failed was closed on all ranks.
            name = "" if is_printed_only else _printing_of(error).name
            if name:
                self._print_error(name, kind, error, trace)
            else:
                self._call_replaced(kind, error, trace)
            return
        self._print_error(armed[0].name, kind, error, trace, armed[0])
        if is_rank_failure(error):  # a dead rank answers no farewell
            _abort(armed[0], 1)
        for guard in armed:
            guard.leave(error)
        for guard in armed:
            if guard.is_alone(_ERROR_SECONDS):
                _abort(guard, _INTERRUPTED if kind is KeyboardInterrupt else 1)
        self.armed.clear()

    def at_exit(self) -> None:
        armed = self._in_reach()
        for guard in armed:
            guard.leave()
        for guard in armed:
            # No rank can leave while a rank that missed a deadline is still stuck.
            code = guard.exit_code or int(guard.comm.is_broken)
            if code and guard.is_alone(_EXIT_SECONDS):
                _abort(guard, code)
        if self.member is not None and os.getpid() == self._owner and is_mpi_running():
            with suppress(OSError, ValueError, AttributeError):
                sys.stdout.flush()  # this may be the end
            self.member.leave()

    def _in_reach(self) -> list[AbortOnError]:
        # A forked process does not take part in MPI.
        if os.getpid() != self._owner:
            return []
        return [guard for guard in self.armed if guard.comm.is_open]

    def _print_error(
        self,
        name: str,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
        armed: AbortOnError | None = None,
    ) -> None:
        printing = _printing_of(error)
        brief = printing.brief
        is_unsaid = isinstance(error, CheckpointError) and not printing.name
        if is_unsaid and armed is not None and armed.is_printed_by_root(error):
            brief = f"{kind.__name__}: {error}".partition("\n")[0]
            brief += f" (rank {armed.comm.root} prints it in full)"
        if brief:
            # Every rank has this error: a thousand copies of its text would not help.
            _write(f"{name}: {brief}\n")
        elif self._next_replaced() is not sys.__excepthook__:
            _write(f"{name}:\n")
            self._call_replaced(kind, error, trace)
        else:
            # In one write, so that lines of other ranks do not come between.
            _write(f"{name}:\n{in_full(error)}")

    def _next_replaced(self) -> Callable[..., object]:
        if self._depth < len(self._replaced):
            return self._replaced[-1 - self._depth]
        return sys.__excepthook__

    def _call_replaced(self, *uncaught: object) -> None:
        """Call the hook that ours replaced; within that call, the one replaced before."""
        replaced = self._next_replaced()
        self._depth += 1
        try:
            replaced(*uncaught)
        finally:
            self._depth -= 1


_HOOK = _Hook()


def watch_errors() -> None:
    """Make only one rank print an error that all ranks raise. Not collective.

    Called before a manager is made, since all ranks raise an error of its creation.
    """
    if "mpi4py.run" not in sys.modules:
        _HOOK.install()


def _words_of(error: BaseException | None) -> bytes:
    return digest_bytes(f"{type(error).__name__}: {error}".encode(errors="replace"))


def _printing_of(error: BaseException) -> Printing:
    """Return how this rank prints an error of the package, or one caused by it."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while isinstance(cause, CheckpointError) and id(cause) not in seen:
        if cause.printing is not None:
            brief = cause.printing.brief.replace(
                type(cause).__name__, type(error).__name__, 1
            )
            return Printing(cause.printing.name, brief)
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return Printing("", "")


def _is_printed_only() -> bool:
    """Return whether the program goes on: the hook was called by hand, or at a prompt."""
    prompt = sys.flags.interactive or hasattr(sys, "ps1")
    if prompt or threading.current_thread() is not threading.main_thread():
        return True
    # Python calls the hook itself when no frame of the program is left.
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 (as `inspect` has it)
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return frame is not None


def _abort(guard: AbortOnError, code: int) -> None:
    """End the job, after the other members of an ensemble, if any, have ended."""
    end = f"the job is aborted with code {code}"
    if guard.member is not None:
        end = f"this member is given up, and when all others have ended {end}"
    _write(
        f"{guard.name}: this rank leaves the job by an error and others do not; they would "
        f"wait for one another without end, so {end}\n"
    )
    if guard.member is not None:
        guard.member.outlive()
    abort_job(code)


def _code_of(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    return leaving.code if isinstance(leaving.code, int) else 1


def _write(text: str) -> None:
    # No failure here may keep the job from ending.
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()
