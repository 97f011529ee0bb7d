# SPDX-License-Identifier: Apache-2.0
"""Checks that boxes tile a global array: without holes, and disjoint or equal. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.decomposition.box_columns import columns_of, meeting_pairs
from mpi_ckpt.decomposition.boxes import Box, intersection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Fewer boxes are compared pair by pair: making arrays of them takes longer.
_FEW_BOXES = 16


@dataclass(frozen=True, slots=True)
class TilingFault:
    """Why some boxes do not tile an array.

    Attributes:
        text: A part of a sentence that names the faulty box.
        boxes: The places, in the given sequence, of the boxes concerned; empty for a hole.
    """

    text: str
    boxes: tuple[int, ...] = ()


def fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> TilingFault | None:
    """Find out whether boxes tile an array.

    Not collective. Thread-safe. Two boxes must be disjoint or equal, since ranks may hold
    replicas; together they must hold every element. Empty boxes are ignored.

    Args:
        shape: The whole array's lengths, in elements.
        boxes: The boxes of all ranks.

    Returns:
        The first fault found, of a box outside of the array, an overlap or a hole; None if
        there is no fault.
    """
    places: dict[Box, list[int]] = {}
    for place, box in enumerate(boxes):
        if 0 not in box.shape:
            places.setdefault(box, []).append(place)
    distinct = list(places)
    for box in distinct:
        if not _is_inside(box, shape):
            return TilingFault(f"{box} lies outside of {shape}", tuple(places[box]))
    overlap = _first_overlap(distinct, len(shape))
    if overlap is not None:
        a, b = (distinct[i] for i in overlap)
        text = f"{a} and {b} overlap at {intersection(a, b)}"
        return TilingFault(text, tuple(sorted(places[a] + places[b])))
    # Without overlaps and inside, boxes with as many elements leave no hole.
    if sum(box.size for box in distinct) == prod(shape):
        return None
    hole = _hole(shape, distinct) if shape else "the scalar"
    return TilingFault(f"no rank holds {hole}")


def _is_inside(box: Box, shape: tuple[int, ...]) -> bool:
    return len(box.shape) == len(shape) and all(
        offset >= 0 and length > 0 and offset + length <= size
        for offset, length, size in zip(box.offset, box.shape, shape, strict=True)
    )


def _first_overlap(boxes: Sequence[Box], ndim: int) -> tuple[int, int] | None:
    if len(boxes) <= _FEW_BOXES:
        pairs = combinations(range(len(boxes)), 2)
        return next(((i, j) for i, j in pairs if intersection(boxes[i], boxes[j])), None)
    offsets, shapes = columns_of(boxes, ndim)
    # A forged file may have boxes of which all overlap: stop at the first pair.
    for a, b in meeting_pairs(offsets, shapes, offsets, shapes):
        found = np.flatnonzero(a < b)
        if len(found):
            return int(a[found[0]]), int(b[found[0]])
    return None


def _hole(shape: tuple[int, ...], boxes: Sequence[Box]) -> Box:
    """Return a box without elements of the given disjoint boxes, as large as it can be."""
    offsets, shapes = columns_of(boxes, len(shape))
    lows, highs = offsets, offsets + shapes
    # What lies below the region along an axis is full, or outside: only its end can grow.
    start, end = _empty_region(shape, lows, highs)
    for axis in range(len(shape)):
        others = np.arange(len(shape)) != axis
        beside = ((lows < end) & (highs > start))[:, others].all(axis=1)
        starts = lows[beside, axis]
        end[axis] = min(starts[starts >= end[axis]], default=shape[axis])
    return Box(tuple(start.tolist()), tuple((end - start).tolist()))


def _empty_region(
    shape: tuple[int, ...], lows: NDArray[np.int64], highs: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find a region without boxes: halve again and again a region that is not full."""
    start, end = np.zeros(len(shape), np.int64), np.array(shape, np.int64)
    while len(lows):
        axis, at = _middle_face(start, end, lows, highs)
        below = end.copy()
        below[axis] = at
        left = np.minimum(highs, below)
        has_part = (left > lows).all(axis=1)
        filled = (left - lows)[has_part].prod(axis=1).sum()
        if filled < (below - start).prod():
            end, lows, highs = below, lows[has_part], left[has_part]
            continue
        start[axis] = at
        right = np.maximum(lows, start)
        has_part = (highs > right).all(axis=1)
        lows, highs = right[has_part], highs[has_part]
    return start, end


def _middle_face(
    start: NDArray[np.int64],
    end: NDArray[np.int64],
    lows: NDArray[np.int64],
    highs: NDArray[np.int64],
) -> tuple[int, int]:
    """Return axis and index of a box's face inside of a region that is not full."""
    faces = np.concatenate((lows, highs))
    is_inside = (faces > start) & (faces < end)
    axis = int(is_inside.sum(axis=0).argmax())
    inside = np.sort(faces[is_inside[:, axis], axis])
    return axis, int(inside[len(inside) // 2])
