# SPDX-License-Identifier: Apache-2.0
"""Waits for one request outside of a `Communicator`, whose waits can call the roll."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["is_done_within"]

_YIELDS = 2000
_PAUSE_SECONDS_MAX = 1e-3


def is_done_within(request: MPI.Request, seconds: float | None) -> bool:
    """Wait for a request, so that signals come and others get the core.

    Not collective by itself. Main thread only.

    Args:
        request: What to wait for.
        seconds: How long; None for as long as it takes.

    Returns:
        Whether it is done. If not, MPI may still write to its buffers.

    Raises:
        MPI.Exception: On the calling rank, if it failed.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    rounds, pause = 0, 0.0
    while not request.Test():
        rounds += 1
        if rounds < _YIELDS:
            os.sched_yield()
            continue
        if deadline is not None and time.monotonic() > deadline:
            return False
        pause = min(pause + 1e-5, _PAUSE_SECONDS_MAX)
        time.sleep(pause)
    return True
