# SPDX-License-Identifier: Apache-2.0
"""Pauses Python's garbage collector where thousands of small values are made."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["without_collections"]


@contextmanager
def without_collections() -> Iterator[None]:
    """Pause the search for cycles within a block, or while a function runs.

    Every leaf is a few small values that all stay alive. Each thousand of them makes the
    collector scan all objects of the process, torch's too: with 20,000 leaves that was two
    fifths of a restore (benchmarks/README.md). Objects that are in no cycle are freed as
    usual.

    Thread-safe: the last block to end enables the collector again, if it was enabled.
    """
    _PAUSE.begin()
    try:
        yield
    finally:
        _PAUSE.end()


class _Pause:
    """Counts the blocks during which the collector is paused. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._was_enabled = False

    def begin(self) -> None:
        with self._lock:
            if self._count == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._count += 1

    def end(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._was_enabled:
                gc.enable()


_PAUSE = _Pause()
