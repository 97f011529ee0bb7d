# SPDX-License-Identifier: Apache-2.0
"""Each way not to tile an array is found, and named by its box."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.decomposition import tiling
from mpi_ckpt.decomposition.boxes import Box
from tests.decomposition.drawing import FULL_SHAPES, SHAPES, slices, tilings, with_range


@pytest.fixture(params=[0, 16], autouse=True, scope="module")
def few_boxes(request):
    """Compare boxes in both ways, as arrays and pair by pair."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "_FEW_BOXES", request.param)
        yield


@st.composite
def tiled(draw, shapes=FULL_SHAPES, fewest=1):
    shape = draw(shapes)
    boxes = draw(tilings(shape))
    return shape, boxes


@given(tiled(SHAPES), st.data())
def test_a_tiling_has_no_fault_with_replicas_and_empty_boxes(drawn, data):
    shape, boxes = drawn
    replicas = data.draw(st.lists(st.sampled_from(boxes), max_size=4))
    empty = [Box((n,) * len(shape), (0,) * len(shape)) for n in (0, 99) if shape]
    everything = data.draw(st.permutations([*boxes, *replicas, *empty]))
    assert tiling.fault(shape, everything) is None


@given(tiled(), st.data())
def test_a_removed_box_is_a_hole_as_large_as_it_can_be(drawn, data):
    shape, boxes = drawn
    removed = data.draw(st.lists(st.sampled_from(boxes), min_size=1, unique=True))
    left = [box for box in boxes if box not in removed]
    found = tiling.fault(shape, left)
    assert found is not None
    assert found.boxes == ()
    if not shape:
        assert found.text == "no rank holds the scalar"
        return
    assert found.text.startswith("no rank holds [")
    held = np.zeros(shape, bool)
    for box in left:
        held[slices(box)] = True
    hole = parsed(found.text)
    assert hole.size
    assert not held[slices(hole)].any()
    for axis, (offset, end) in enumerate(zip(hole.offset, hole.end, strict=True)):
        below = with_range(hole, axis, offset - 1, 1)
        above = with_range(hole, axis, end, 1)
        assert offset == 0 or held[slices(below)].any()
        assert end == shape[axis] or held[slices(above)].any()


@given(tiled(), st.data())
def test_a_box_that_grows_into_its_neighbour_overlaps(drawn, data):
    shape, boxes = drawn
    number = data.draw(st.integers(0, len(boxes) - 1))
    box = boxes[number]
    axes = [axis for axis, end in enumerate(box.end) if end < shape[axis]]
    if not axes:
        return
    axis = data.draw(st.sampled_from(axes))
    boxes[number] = with_range(box, axis, box.offset[axis], box.shape[axis] + 1)
    found = tiling.fault(shape, boxes)
    assert found is not None
    a, b = (boxes[i] for i in found.boxes)
    assert number in found.boxes
    assert found.text in (overlap(a, b), overlap(b, a))


@given(tiled(), st.data())
def test_a_box_outside_is_named_with_its_replicas(drawn, data):
    shape, boxes = drawn
    if not shape:
        return
    number = data.draw(st.integers(0, len(boxes) - 1))
    axis = data.draw(st.integers(0, len(shape) - 1))
    offset = data.draw(st.sampled_from([-1, shape[axis]]))
    boxes[number] = with_range(boxes[number], axis, offset, 1)
    boxes.append(boxes[number])
    assert tiling.fault(shape, boxes) == tiling.TilingFault(
        f"{boxes[number]} lies outside of {shape}", (number, len(boxes) - 1)
    )


def test_messages():
    assert tiling.fault((4, 2), [Box((0, 2), (4, 1))]) == tiling.TilingFault(
        "[0:4, 2:3] lies outside of (4, 2)", (0,)
    )
    assert tiling.fault((4,), [Box((0,), (3,)), Box((2,), (2,))]) == tiling.TilingFault(
        "[0:3] and [2:4] overlap at [2:3]", (0, 1)
    )
    assert tiling.fault((4,), [Box((0,), (3,))]) == tiling.TilingFault(
        "no rank holds [3:4]"
    )
    assert tiling.fault((4, 2), [Box((0,), (4,))]) == tiling.TilingFault(
        "[0:4] lies outside of (4, 2)", (0,)
    )


def test_ten_thousand_boxes_with_a_hole_and_with_an_overlap():
    shape = (30, 40, 10)
    boxes = [Box(index, (1, 1, 1)) for index in np.ndindex(*shape)]
    assert tiling.fault(shape, boxes) is None
    missing = boxes.pop(7777)
    assert tiling.fault(shape, boxes) == tiling.TilingFault(f"no rank holds {missing}")
    boxes.append(Box((0, 0, 0), (1, 1, 2)))
    found = tiling.fault(shape, boxes)
    assert found == tiling.TilingFault(
        "[0:1, 0:1, 0:1] and [0:1, 0:1, 0:2] overlap at [0:1, 0:1, 0:1]",
        (0, len(boxes) - 1),
    )


def overlap(a: Box, b: Box) -> str:
    return f"{a} and {b} overlap at {tiling.intersection(a, b)}"


def parsed(text: str) -> Box:
    ranges = text.partition("[")[2].rstrip("]").split(", ")
    ends = [tuple(int(x) for x in one.split(":")) for one in ranges]
    return Box(tuple(o for o, _ in ends), tuple(e - o for o, e in ends))
