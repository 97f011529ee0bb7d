# SPDX-License-Identifier: Apache-2.0
"""Which memory of this process may only be read: writing there kills it.

NumPy marks an array over a file that was mapped to be read; a tensor made of one has no
such mark. The kernel knows (proc(5), /proc/pid/maps).
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import suppress
from pathlib import Path

__all__ = ["ReadonlyMemory"]


class ReadonlyMemory:
    """The memory of this process that may only be read, as it is now.

    Not collective. Thread-safe. Nothing, where the kernel does not tell.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        with suppress(OSError):
            for line in Path("/proc/self/maps").read_text().splitlines():
                span, permissions = line.split(maxsplit=2)[:2]
                if permissions.startswith("r-"):
                    start, end = span.split("-")
                    self._starts.append(int(start, 16))
                    self._ends.append(int(end, 16))

    def __contains__(self, address: object) -> bool:
        assert isinstance(address, int)
        place = bisect_right(self._starts, address) - 1
        return place >= 0 and address < self._ends[place]
