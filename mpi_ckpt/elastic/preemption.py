# SPDX-License-Identifier: Apache-2.0
"""Turns signals on any rank into requests to stop, which all ranks see at the next step."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType, TracebackType

__all__ = ["PreemptionGuard"]

_ASK_ONLY = (signal.SIGUSR1, signal.SIGUSR2)
_INTERRUPTED = (
    b"\nmpi_ckpt: Ctrl-C: saves at the next step() and stops; press again to stop now\n"
)

DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class PreemptionGuard:
    """Turns signals into a flag while it is installed.

    Not collective: each rank has its own flag, and the manager agrees on them. Previous
    handlers are called as well. A second SIGINT ends the process, as without the guard.

    Schedulers and terminals signal whole groups, data-loader workers among them. A process
    forked from this one never sets a flag: it ignores signals that only ask for a save
    (SIGUSR1, SIGUSR2, the first SIGINT), so that its trainer can save; any other signal
    acts as without the guard.

    Args:
        signals: Signals that ask to stop.
        tells: Whether to answer a first SIGINT on standard error.

    Attributes:
        is_heeded: Whether the program checks the flag. Until then SIGINT interrupts at
            once.
        requested: Whether a signal has arrived.
        reason: Name of the first signal; empty before.
    """

    def __init__(
        self, signals: Sequence[signal.Signals] = DEFAULT_SIGNALS, *, tells: bool = False
    ) -> None:
        self._signals = tuple(signals)
        self._tells = tells
        self._previous: dict[int, Any] = {}
        self._owner = os.getpid()
        self._passed_in_child: set[int] = set()
        self.is_heeded = True
        self.requested = False
        self.reason = ""

    def install(self) -> bool:
        """Install the handlers. Main thread only.

        Returns:
            False if this is not the main thread: Python then allows no handler, and the
            guard watches for nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        self._owner = os.getpid()
        for number in self._signals:
            if number not in self._previous:
                self._previous[number] = signal.signal(number, self._note)
        return True

    def uninstall(self) -> None:
        """Put the previous handlers back. Main thread only. Callable twice."""
        for number, previous in self._previous.items():
            # If other code took the signal later, it keeps it.
            if signal.getsignal(number) == self._note:
                signal.signal(number, _restorable(previous))
        self._previous.clear()

    def retire(self) -> None:
        """Stop watching, but ignore signals that ask other ranks for a save and would kill.

        Main thread only. Callable twice. Schedulers signal all processes of a job: a rank
        that is done must not die of SIGUSR1, and end the job, while the others save.
        """
        watched = [number for number in _ASK_ONLY if number in self._previous]
        self.uninstall()
        for number in watched:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _let_pass)

    def displaced(self) -> list[str]:
        """Return the signals that other code has taken since. Not collective."""
        return [
            signal.Signals(number).name
            for number in self._previous
            if signal.getsignal(number) != self._note
        ]

    def __enter__(self) -> PreemptionGuard:
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.uninstall()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # INVARIANT: a handler only sets a flag, and calls the previous handler.
        previous = self._previous.get(number)
        if os.getpid() != self._owner:
            self._note_in_child(number, previous, frame)
            return
        interrupt = number == signal.SIGINT
        again = interrupt and (self.requested or not self.is_heeded)
        self.requested = True
        self.reason = self.reason or signal.Signals(number).name
        if interrupt and self._tells and not again:
            with suppress(OSError):
                os.write(2, _INTERRUPTED)  # Python itself may be printing
        if again:
            self._as_if_absent(number, previous, frame)
        elif callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def _note_in_child(self, number: int, previous: Any, frame: FrameType | None) -> None:  # noqa: ANN401 (a handler)
        asks_only = number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
        nobody_there = previous in (signal.SIG_DFL, signal.default_int_handler, _let_pass)
        if asks_only and nobody_there and number not in self._passed_in_child:
            # A second SIGINT is intended; a request for a save may come twice.
            if number == signal.SIGINT:
                self._passed_in_child.add(number)
            return
        self._as_if_absent(number, previous, frame)

    def _as_if_absent(
        self,
        number: int,
        previous: Any,  # noqa: ANN401 (a handler, or one of the signal module's constants)
        frame: FrameType | None,
    ) -> None:
        if callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _let_pass(_number: int, _frame: FrameType | None) -> None:
    """Do nothing. Not SIG_IGN, which programs started from here would inherit."""


def _restorable(previous: Any) -> Any:  # noqa: ANN401
    # None means a handler that Python did not install and cannot put back.
    return signal.SIG_DFL if previous is None else previous
