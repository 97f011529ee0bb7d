# SPDX-License-Identifier: Apache-2.0
"""Reports a long save or restore, and warns when it makes no progress. No MPI.

Watches from its own thread, which lives as long as the operation and uses no file system,
since a hanging file system may be the reason.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.storage.format.layout import generation_number, is_partial_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

logger = logging.getLogger(__name__)

_NAME = "mpi_ckpt-watch"
_OUR_THREADS = "mpi_ckpt-"
_LOOKS = 4
"""How often it looks before it calls that no progress."""
_FRAMES_MAX = 12
_REPORTED_SECONDS = 30.0
"""How often a long operation is reported."""


class Watchdog:
    """Warns once if an operation makes no progress. A context manager around the operation.

    Not collective. On any thread: it watches that thread, and all threads that write, read
    or digest for it.

    Args:
        doing: The rank and the operation, for the warning.
        quiet_seconds: Time without progress after which it warns.
        steps: Returns a value that changes with progress, apart from the bytes that the
            threads read and write: it is compared, and not kept.
        phase: Returns the phase that the operation is in.
        report: Called every 30 s.
    """

    def __init__(
        self,
        doing: str,
        quiet_seconds: float,
        steps: Callable[[], object],
        phase: Callable[[], str],
        report: Callable[[], None] | None = None,
    ) -> None:
        self._doing = doing
        self._quiet_seconds = quiet_seconds
        self._steps = steps
        self._phase = phase
        self._report = report
        self._over = threading.Event()
        self._watched = threading.current_thread()
        self._thread = threading.Thread(target=self._watch, name=_NAME, daemon=True)

    def __enter__(self) -> Watchdog:
        self._watched = threading.current_thread()
        with suppress(RuntimeError):  # the interpreter is ending
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        seen, since = self._look(), time.monotonic()
        reported, has_warned = since, False
        pause = min(self._quiet_seconds / _LOOKS, _REPORTED_SECONDS)
        while not self._over.wait(pause):
            found, now = self._look(), time.monotonic()
            if found != seen:
                seen, since = found, now
            elif now - since >= self._quiet_seconds and not has_warned:
                self._warn(now - since)
                has_warned = True
            if self._report is not None and now - reported >= _REPORTED_SECONDS:
                reported = now
                self._report()

    def _look(self) -> object:
        return (
            self._phase(),
            self._steps(),
            [_bytes_moved(thread) for thread in self._threads()],
        )

    def _threads(self) -> list[threading.Thread]:
        ours = [
            thread
            for thread in threading.enumerate()
            if thread.name.startswith(_OUR_THREADS) and thread.name != _NAME
        ]
        return [self._watched, *(thread for thread in ours if thread is not self._watched)]

    def _warn(self, seconds: float) -> None:
        frames = sys._current_frames()  # noqa: SLF001 (documented)
        places = [
            "\n    ".join([f"{thread.name} is at", *_callers(frames[thread.ident])])
            for thread in self._threads()
            if thread.ident in frames
        ]
        logger.warning(
            "%s: no progress for %.2g s, phase %s, files: %s\n  %s",
            self._doing,
            seconds,
            self._phase() or "not begun",
            ", ".join(_open_files()) or "none open",
            "\n  ".join(places),
        )


def _bytes_moved(thread: threading.Thread) -> object:
    """Return the bytes that a thread has read and written, page cache or not."""
    try:
        lines = Path(f"/proc/self/task/{thread.native_id}/io").read_text().splitlines()
    except OSError:
        return object()  # the thread is gone or unreadable: no warning without proof
    return thread.native_id, lines[:2]


def _callers(frame: FrameType | None) -> list[str]:
    """Return the frames of a stack as text, innermost first."""
    places: list[str] = []
    while frame is not None and len(places) < _FRAMES_MAX:
        code = frame.f_code
        places.append(f"{code.co_filename}:{frame.f_lineno}, in {code.co_name}")
        frame = frame.f_back
    return places


def _open_files() -> list[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (no objects made)
        with suppress(OSError):
            target = Path("/proc/self/fd", name).readlink()
            if _is_of_a_generation(target.name) or _is_of_a_generation(target.parent.name):
                found.add(str(target))
    return sorted(found)


def _is_of_a_generation(name: str) -> bool:
    return is_partial_name(name) or generation_number(name) is not None
