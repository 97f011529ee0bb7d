# SPDX-License-Identifier: Apache-2.0
"""How much memory a piece of work took at its peak, beyond what was there before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
from pathlib import Path

__all__ = ["PeakMemory"]

_INTERVAL_SECONDS = 0.001


class PeakMemory:
    """Watches this process's resident memory between `start` and `stop`.

    The kernel keeps the high-water mark exactly; where it lets nobody reset that, a
    thread looks every millisecond instead.
    """

    def __init__(self) -> None:
        self._before = 0
        self._highest = 0
        self._done = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        """Note what is there now, less what is only kept to be used again."""
        _give_back()
        self._before = _resident("VmRSS")
        if not _reset():
            self._highest = self._before
            self._done.clear()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def stop(self) -> int:
        """Return by how many bytes more than at the start were resident at most."""
        if self._watcher is None:
            return max(0, _resident("VmHWM") - self._before)
        self._done.set()
        self._watcher.join()
        self._watcher = None
        return max(0, self._highest - self._before)

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL_SECONDS):
            self._highest = max(self._highest, _resident("VmRSS"))


def _give_back() -> None:
    # What the allocator keeps of freed memory would hide as much of the next peak.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # Some kernels take the order and ignore it.
    return _resident("VmHWM") - _resident("VmRSS") < 1 << 20


def _resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
