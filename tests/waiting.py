# SPDX-License-Identifier: Apache-2.0
"""How tests wait: until something has happened, and for no longer than a limit.

Limits are for what hangs; nothing is ever proven by one. ``MPI_CKPT_TEST_SLOW=3`` triples
all of them, for a machine that is so much slower.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SLOW = float(os.environ.get("MPI_CKPT_TEST_SLOW") or 1)


def limit(seconds: float) -> float:
    """Return a limit in seconds for this machine."""
    return seconds * SLOW


def wait_for(
    condition: Callable[[], object], seconds: float = 60, pause_seconds: float = 0.01
) -> bool:
    """Wait until a condition holds; return whether it does.

    Args:
        condition: What is looked at.
        seconds: How long to wait at most, on a machine that is not slow.
        pause_seconds: Between two looks.
    """
    deadline = time.monotonic() + limit(seconds)
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(pause_seconds)
    return bool(condition())
