# SPDX-License-Identifier: Apache-2.0
"""Computes with many boxes at a time, as columns of NumPy. Pure.

Boxes of fewer dimensions get leading dimensions of length 1, which leaves the order of
their elements as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.decomposition.boxes import Box

# Fewer pairs are compared one by one: dividing them further costs more.
_FEW_PAIRS = 1 << 14

# Pairs compared at a time: 1 MiB for each comparison.
_CHUNK_PAIRS = 1 << 20

# Boxes of each side that are looked at to find a place to divide.
_SAMPLED = 512


def columns_of(boxes: Sequence[Box], ndim: int) -> tuple[NDArray[np.int64], ...]:
    """Return offsets and shapes of boxes as two arrays. Not collective.

    Args:
        boxes: n boxes of at most ``ndim`` dimensions.
        ndim: Number of dimensions d of the result.

    Returns:
        Offsets and shapes, int64 of shape (n, d).
    """
    offsets = np.array([(0,) * (ndim - len(b.offset)) + b.offset for b in boxes], np.int64)
    shapes = np.array([(1,) * (ndim - len(b.shape)) + b.shape for b in boxes], np.int64)
    return offsets.reshape(len(boxes), ndim), shapes.reshape(len(boxes), ndim)


def split_runs(
    shapes: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut a run of elements of each box into boxes. Not collective.

    Args:
        shapes: Shapes of the boxes, (n, d), d > 0.
        starts: First element of each run, counted in C order of its box; (n,).
        stops: One past each run's last element; (n,). No run is empty.

    Returns:
        For each of at most n(2d-1) boxes, in the order of the runs and their elements: the
        row of its run, (k,); its offset inside of the whole box and its shape, (k, d).
    """
    ndim = shapes.shape[1]
    strides = strides_of(shapes)
    row = np.arange(len(shapes))
    prefix = np.zeros_like(shapes)
    found: list[tuple[NDArray[np.int64], ...]] = []
    for axis in range(ndim):
        stride = strides[row, axis]
        first, last = starts // stride, (stops - 1) // stride
        has_head, has_tail = starts % stride != 0, stops % stride != 0
        # Whole hyperplanes of this axis between a partial first and a partial last.
        begin, end = first + has_head, last + ~has_tail
        is_whole = begin < end
        offset = prefix[is_whole]
        offset[:, axis] = begin[is_whole]
        shape = shapes[row[is_whole]]
        shape[:, :axis] = 1
        shape[:, axis] = (end - begin)[is_whole]
        found.append((row[is_whole], offset, shape))
        # At most three boxes leave this axis: a partial first, whole ones, a partial last.
        # The rest lies within single hyperplanes, and is cut along the next axes.
        is_inner = (first == last) & (has_head | has_tail)
        within, until = starts % stride, stops - last * stride
        inner = np.flatnonzero(is_inner)
        head = np.flatnonzero(has_head & ~is_inner)
        tail = np.flatnonzero(has_tail & ~is_inner)
        starts = np.concatenate((within[inner], within[head], 0 * tail))
        stops = np.concatenate((until[inner], stride[head], until[tail]))
        index = np.concatenate((first[inner], first[head], last[tail]))
        rows = np.concatenate((inner, head, tail))
        row, prefix = row[rows], prefix[rows]
        prefix[:, axis] = index
    rows, offsets, parts = (np.concatenate(column) for column in zip(*found, strict=True))
    # The axes were done one after the other; runs need their boxes in order of elements.
    order = np.lexsort((np.einsum("kd,kd->k", offsets, strides[rows]), rows))
    return rows[order], offsets[order], parts[order]


def strides_of(shapes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the elements between neighbours along each axis, (n, d). Not collective."""
    strides = np.ones_like(shapes)
    strides[:, :-1] = np.cumprod(shapes[:, :0:-1], axis=1)[:, ::-1]
    return strides


def pairs_that_meet(
    offsets_a: NDArray[np.int64],
    shapes_a: NDArray[np.int64],
    offsets_b: NDArray[np.int64],
    shapes_b: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find all pairs of boxes that share elements. Not collective.

    Divides space in two, each time along the axis that leaves the fewest pairs to compare;
    a box that straddles the cut goes to both sides. Takes about n log n steps for boxes
    that hardly overlap, and memory for the boxes, the pairs found and a fixed chunk.

    Args:
        offsets_a: First indices of n boxes, (n, d).
        shapes_a: Their lengths, (n, d).
        offsets_b: First indices of m boxes, (m, d).
        shapes_b: Their lengths, (m, d).

    Returns:
        The rows of the first box and of the second box of each pair, in increasing order.
    """
    nothing = np.empty(0, np.int64)
    found = [(nothing, nothing), *meeting_pairs(offsets_a, shapes_a, offsets_b, shapes_b)]
    i, j = (np.concatenate(rows) for rows in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order]


def meeting_pairs(
    offsets_a: NDArray[np.int64],
    shapes_a: NDArray[np.int64],
    offsets_b: NDArray[np.int64],
    shapes_b: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Find pairs as `pairs_that_meet` does, a chunk of bounded size at a time.

    Not collective. Who needs one pair only can stop at the first, however many there are.
    """
    low_a, low_b = offsets_a.T.copy(), offsets_b.T.copy()
    high_a, high_b = (offsets_a + shapes_a).T.copy(), (offsets_b + shapes_b).T.copy()
    a = np.flatnonzero((shapes_a > 0).all(axis=1))
    b = np.flatnonzero((shapes_b > 0).all(axis=1))
    lows = np.full(len(low_a), np.iinfo(np.int64).min)
    highs = np.full(len(low_a), np.iinfo(np.int64).max)
    regions = [(a, b, lows, highs)]
    while regions:
        a, b, lows, highs = regions.pop()
        sides = [(low_a[:, a], high_a[:, a]), (low_b[:, b], high_b[:, b])]
        cut = _best_cut(sides, lows, highs)
        if cut is None:
            for i, j in _compare(sides, lows):
                yield a[i], b[j]
            continue
        axis, at = cut
        (la, ha), (lb, hb) = sides
        below, above = highs.copy(), lows.copy()
        below[axis] = above[axis] = at
        regions.append((a[la[axis] < at], b[lb[axis] < at], lows, below))
        regions.append((a[ha[axis] > at], b[hb[axis] > at], above, highs))


def _best_cut(
    sides: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    lows: NDArray[np.int64],
    highs: NDArray[np.int64],
) -> tuple[int, int] | None:
    """Return axis and index at which to divide a region; None if it is not worth it."""
    pairs = sides[0][0].shape[1] * sides[1][0].shape[1]
    if pairs <= _FEW_PAIRS:
        return None
    # A cut that leaves more than this is not worth the boxes that it doubles.
    best, cut = 0.9 * pairs, None
    for axis in range(len(lows)):
        sampled = [x[axis, :: 1 + x.shape[1] // _SAMPLED] for side in sides for x in side]
        faces = np.concatenate(sampled)
        faces = faces[(faces > lows[axis]) & (faces < highs[axis])]
        if not len(faces):
            continue
        at = int(np.partition(faces, len(faces) // 2)[len(faces) // 2])
        below = [np.count_nonzero(low[axis] < at) for low, _ in sides]
        above = [np.count_nonzero(high[axis] > at) for _, high in sides]
        left = below[0] * below[1] + above[0] * above[1]
        if left < best:
            best, cut = left, (axis, at)
    return cut


def _compare(
    sides: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], lows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Compare all pairs; give those whose first shared element is in the region."""
    (low_a, high_a), (low_b, high_b) = sides
    step = max(1, _CHUNK_PAIRS // max(1, low_b.shape[1]))
    for start in range(0, low_a.shape[1], step):
        some = slice(start, start + step)
        meets = np.ones((low_a[:, some].shape[1], low_b.shape[1]), bool)
        for axis in range(len(lows)):
            meets &= low_a[axis, some, None] < high_b[axis]
            meets &= low_b[axis] < high_a[axis, some, None]
        i, j = np.nonzero(meets)
        i += start
        # A pair that straddles a cut is found on both sides of it, and counts on one side.
        is_here = (np.maximum(low_a[:, i], low_b[:, j]) >= lows[:, None]).all(axis=0)
        yield i[is_here], j[is_here]
