# SPDX-License-Identifier: Apache-2.0
"""Draws domains and boxes that tile them."""

from __future__ import annotations

from hypothesis import strategies as st

from mpi_ckpt.decomposition.boxes import Box

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)
FULL_SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)


@st.composite
def tilings(draw, shape: tuple[int, ...], most: int = 12) -> list[Box]:
    """Cut a domain by planes, each through one of the boxes; in any order."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, most - 1))):
        box = boxes[draw(st.integers(0, len(boxes) - 1))]
        axes = [axis for axis, n in enumerate(box.shape) if n > 1]
        if not axes:
            continue
        axis = draw(st.sampled_from(axes))
        length = draw(st.integers(1, box.shape[axis] - 1))
        boxes.remove(box)
        boxes += [
            with_range(box, axis, box.offset[axis], length),
            with_range(box, axis, box.offset[axis] + length, box.shape[axis] - length),
        ]
    return draw(st.permutations(boxes))


@st.composite
def inner_boxes(draw, shape: tuple[int, ...]) -> Box:
    """Draw any box of a domain, also an empty one."""
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    sizes = zip(shape, offset, strict=True)
    return Box(offset, tuple(draw(st.integers(0, n - o)) for n, o in sizes))


def with_range(box: Box, axis: int, offset: int, length: int) -> Box:
    """Return a box with another range along one axis."""
    return Box(
        (*box.offset[:axis], offset, *box.offset[axis + 1 :]),
        (*box.shape[:axis], length, *box.shape[axis + 1 :]),
    )


def slices(box: Box) -> tuple[slice, ...]:
    """Return the index of a box's elements in an array."""
    return tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))
