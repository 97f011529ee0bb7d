# SPDX-License-Identifier: Apache-2.0
"""Describes how elements lie in memory, and finds memory that is read-only.

NumPy marks an array over a file that is mapped read-only; a tensor made from such an array
has no mark, and writing to it kills the process. The kernel knows (proc(5),
/proc/pid/maps).
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Layout:
    """The memory layout that a new value needs to match the saved one.

    Attributes:
        order: The dimensions, the one of the longest strides first; empty if that is the
            order of the shape (C order).
        swapped: Whether the bytes of an element are in the opposite order of this
            machine's.
    """

    order: tuple[int, ...] = ()
    swapped: bool = False

    @classmethod
    def from_json(cls, node: dict[str, Any], dims: int) -> Layout:
        """Read a layout from the node of a leaf; see `to_json`. Not collective.

        Raises:
            ValueError: On the calling rank, if it is no layout of so many dimensions.
        """
        order = tuple(node.get("order", ()))
        if order and sorted(order) != list(range(dims)):
            raise ValueError(f"{order} is no order of {dims} dimensions")
        return cls(order, bool(node.get("swapped", False)))

    def to_json(self) -> dict[str, Any]:
        """Return its parts that are not the default, as JSON values. Not collective."""
        node: dict[str, Any] = {}
        if self.order:
            node["order"] = list(self.order)
        if self.swapped:
            node["swapped"] = True
        return node


def layout_of(strides: Sequence[int], *, swapped: bool = False) -> Layout:
    """Return the layout of a value that is not in C order.

    Not collective. Thread-safe. Gaps and repeated elements are not part of it: a new value
    has none.

    Args:
        strides: Stride of each dimension, in any unit.
        swapped: See `Layout`.
    """
    order = tuple(sorted(range(len(strides)), key=lambda dim: -abs(strides[dim])))
    return Layout(() if order == tuple(range(len(strides))) else order, swapped)


def overlaps_itself(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Return whether two elements share memory, as after ``expand`` or ``as_strided``.

    Not collective. Thread-safe.

    Args:
        shape: Shape in elements.
        strides: Strides in bytes.
        itemsize: Bytes of an element.
    """
    if 0 in shape:
        return False
    dims = sorted((abs(step), n) for n, step in zip(shape, strides, strict=True) if n > 1)
    end = itemsize
    for step, n in dims:
        if step < end:
            break
        end += step * (n - 1)
    else:
        return False
    if dims[0][0] == 0:
        return True
    # The elements interleave, so every byte is checked by writing to an image of the
    # memory.
    span = sum(step * (n - 1) for step, n in dims) + itemsize
    image = np.zeros(span, np.uint8)
    steps, counts = zip(*dims, strict=True)
    bytes_of = np.lib.stride_tricks.as_strided(image, (*counts, itemsize), (*steps, 1))
    bytes_of[...] = 1
    return int(image.sum()) < bytes_of.size


class ReadonlyMemory:
    """The read-only memory of this process, read when first needed.

    Not collective. Empty if the kernel does not tell. Reading it takes a millisecond.
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
