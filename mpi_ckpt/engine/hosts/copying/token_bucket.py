# SPDX-License-Identifier: Apache-2.0
"""Limits how fast bytes pass, by a bucket of tokens that fills at a rate. No MPI."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_BUCKET_BYTES = 64 << 20


class Stopped(Exception):
    """The end of bytes that pass: they are no longer wanted."""


class TokenBucket:
    """Lets bytes pass at a rate. One thread takes; any thread may open or stop it.

    Not collective. Time that the taker loses elsewhere, in slow reads, is made up for by
    64 MiB at most.

    Args:
        rate: Bytes per second.
        clock: Returns seconds.
        pause: Waits so many seconds, less if the event is set meanwhile.
    """

    def __init__(
        self,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        self._rate = rate
        self._clock = clock
        self._pause = pause
        self._tokens = 0.0
        self._filled_at = clock()
        self._is_open = threading.Event()
        self._is_stopped = False

    def take(self, nbytes: int) -> None:
        """Wait until so many bytes may have passed.

        Raises:
            Stopped: On the calling rank, if it was stopped.
        """
        now = self._clock()
        filled = self._tokens + (now - self._filled_at) * self._rate
        self._tokens, self._filled_at = min(filled, _BUCKET_BYTES) - nbytes, now
        if self._tokens < 0 and not self._is_open.is_set():
            seconds = min(-self._tokens / self._rate, threading.TIMEOUT_MAX)
            self._pause(self._is_open, seconds)
        if self._is_stopped:
            raise Stopped

    def open(self) -> None:
        """Let all that comes pass at once."""
        self._is_open.set()

    def stop(self) -> None:
        """Let nothing more pass."""
        self._is_stopped = True
        self._is_open.set()
