# SPDX-License-Identifier: Apache-2.0
"""Defines a box: a range of indices in each dimension of a global array. Pure."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mpi_ckpt.decomposition.box_columns import split_runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# A named tuple, not a dataclass: thousands are made at a time, five times as fast.
class Box(NamedTuple):
    """A range of indices in each dimension of a global array.

    Attributes:
        offset: First index of each dimension, in elements.
        shape: Length of each dimension, in elements; ``()`` is the box of a scalar.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        """One past the last index of each dimension."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """Return the box of a whole array. Not collective. Thread-safe."""
        return cls((0,) * len(shape), shape)

    def __str__(self) -> str:
        ranges = [f"{o}:{e}" for o, e in zip(self.offset, self.end, strict=True)]
        return f"[{', '.join(ranges)}]"


def intersection(a: Box, b: Box) -> Box | None:
    """Return the elements that two boxes share, None if they share none. Not collective."""
    offset = tuple(map(max, a.offset, b.offset))
    end = tuple(map(min, a.end, b.end))
    shape = tuple(e - o for o, e in zip(offset, end, strict=True))
    return Box(offset, shape) if all(n > 0 for n in shape) else None


def grow(box: Box, ghosts: Sequence[tuple[int, int]]) -> Box:
    """Extend a box on each side; the result may stick out of the domain. Not collective.

    Args:
        box: The box.
        ghosts: For each dimension, the elements to add below and above the box.
    """
    offset = tuple(o - low for o, (low, _) in zip(box.offset, ghosts, strict=True))
    shape = tuple(n + sum(both) for n, both in zip(box.shape, ghosts, strict=True))
    return Box(offset, shape)


def boxes_of_run(box: Box, start: int, stop: int) -> list[Box]:
    """Return the boxes of consecutive elements of a box, in their order. Not collective.

    Args:
        box: The box, of d dimensions.
        start: First element of the run, counted in C order of the box.
        stop: One past the run's last element.

    Returns:
        At most 2d-1 boxes, in the indices of the whole array.
    """
    if start >= stop:
        return []
    if stop - start == box.size:
        return [box]
    _, offsets, shapes = split_runs(
        np.array([box.shape], np.int64), np.array([start]), np.array([stop])
    )
    offsets += np.array(box.offset, np.int64)
    return [
        Box(tuple(offset), tuple(shape))
        for offset, shape in zip(offsets.tolist(), shapes.tolist(), strict=True)
    ]


def wrapped(
    box: Box, shape: Sequence[int], periodic: Sequence[bool]
) -> list[tuple[Box, tuple[int, ...]]]:
    """Return the parts of a box that the domain has. Not collective.

    Args:
        box: The box, which may stick out of the domain on any side.
        shape: Lengths of the domain, in elements.
        periodic: Whether the domain repeats itself along each dimension. In the other
            dimensions the parts outside of the domain are left out.

    Returns:
        For each part its box in the domain, and its offset inside of the given box.
    """
    ranges = [
        list(_ranges(offset, offset + length, size, repeats))
        for offset, length, size, repeats in zip(
            box.offset, box.shape, shape, periodic, strict=True
        )
    ]
    return [
        (
            Box(tuple(start for start, _, _ in part), tuple(n for _, n, _ in part)),
            tuple(inside for _, _, inside in part),
        )
        for part in product(*ranges)
    ]


def _ranges(
    first: int, end: int, size: int, repeats: bool
) -> Iterator[tuple[int, int, int]]:
    """Give start in the domain, length, and offset in the box, along one dimension."""
    if not repeats:
        start, stop = max(first, 0), min(end, size)
        if start < stop:
            yield start, stop - start, start - first
        return
    position = first
    while position < end and size:
        start = position % size
        length = min(size - start, end - position)
        yield start, length, position - first
        position += length
