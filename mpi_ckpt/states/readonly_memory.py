# SPDX-License-Identifier: Apache-2.0
"""Which memory of this process may only be read: writing there kills it.

NumPy marks an array over a file that was mapped to be read; a tensor made of one has no
such mark. The kernel knows (proc(5), /proc/pid/maps).
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import suppress
from functools import cached_property
from pathlib import Path

__all__ = ["ReadonlyMemory"]


class ReadonlyMemory:
    """The memory of this process that may only be read, as it is when first asked for.

    Not collective. Nothing, where the kernel does not tell. It is a millisecond's work.
    """

    @cached_property
    def _spans(self) -> tuple[list[int], list[int]]:
        starts: list[int] = []
        ends: list[int] = []
        with suppress(OSError):
            for line in Path("/proc/self/maps").read_text().splitlines():
                span, permissions = line.split(maxsplit=2)[:2]
                if permissions.startswith("r-"):
                    start, end = span.split("-")
                    starts.append(int(start, 16))
                    ends.append(int(end, 16))
        return starts, ends

    def __contains__(self, address: object) -> bool:
        assert isinstance(address, int)
        starts, ends = self._spans
        place = bisect_right(starts, address) - 1
        return place >= 0 and address < ends[place]
