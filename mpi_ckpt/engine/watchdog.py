# SPDX-License-Identifier: Apache-2.0
"""Says when a save or restore makes no progress, and where it is. No MPI.

Looks on from a thread of its own, which lives as long as the operation it watches and
touches no file system: one that hangs may be what there is to tell.
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


class Watchdog:
    """Warns once if an operation stands still. A context manager around the operation.

    Not collective. On any thread, which is the one that is watched, with all threads that
    write, read or digest for it.

    Args:
        doing: The rank and the operation, told in the warning.
        quiet_seconds: How long nothing may move.
        steps: Returns what changes when the operation gets on, beside the bytes that
            its threads read and write: compared, and not kept.
        phase: Returns the phase that the operation is in.
    """

    def __init__(
        self,
        doing: str,
        quiet_seconds: float,
        steps: Callable[[], object],
        phase: Callable[[], str],
    ) -> None:
        self._doing = doing
        self._quiet_seconds = quiet_seconds
        self._steps = steps
        self._phase = phase
        self._over = threading.Event()
        self._watched = threading.current_thread()
        self._thread = threading.Thread(target=self._watch, name=_NAME, daemon=True)

    def __enter__(self) -> Watchdog:
        self._watched = threading.current_thread()
        with suppress(RuntimeError):  # the interpreter is on its way out
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        seen, since = self._look(), time.monotonic()
        while not self._over.wait(self._quiet_seconds / _LOOKS):
            now = self._look()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since >= self._quiet_seconds:
                self._warn(time.monotonic() - since)
                return

    def _look(self) -> object:
        return self._phase(), self._steps(), [_bytes_moved(one) for one in self._threads()]

    def _threads(self) -> list[threading.Thread]:
        ours = [
            thread
            for thread in threading.enumerate()
            if thread.name.startswith(_OUR_THREADS) and thread.name != _NAME
        ]
        return [self._watched, *(one for one in ours if one is not self._watched)]

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
        return object()  # gone, or not to be known: nobody is accused without proof
    return thread.native_id, lines[:2]


def _callers(frame: FrameType | None) -> list[str]:
    """Return the places of a stack, innermost first."""
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
