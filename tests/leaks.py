# SPDX-License-Identifier: Apache-2.0
"""What a piece of code leaves behind in its process: open descriptors and threads."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from typing import TYPE_CHECKING

from tests.waiting import limit

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_SECONDS = limit(5)
"""A thread that was told to end may not have had its turn yet, in at least so long.

torch's loader does not wait for the thread that feeds its workers: on a busy machine it,
and the pipe it holds, are still there when the loader is gone.
"""

_PAUSE_SECONDS = 0.01

_Things = set[object]


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Fail if what is opened or started inside is still there a while after the end."""
    before = _things()
    yield
    # Turns and not the clock: the whole process may have stood still.
    for _ in range(int(PATIENCE_SECONDS / _PAUSE_SECONDS)):
        left = _things() - before
        if not left:
            return
        gc.collect()  # what has ended by now may be held by a cycle
        time.sleep(_PAUSE_SECONDS)
    assert not left, f"left behind: {left}"


def _things() -> _Things:
    return {*_descriptors(), *threading.enumerate()}


def _descriptors() -> Iterator[tuple[str, str]]:
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            yield number, os.readlink(f"/proc/self/fd/{number}")
