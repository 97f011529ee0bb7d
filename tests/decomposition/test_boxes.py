# SPDX-License-Identifier: Apache-2.0
"""Boxes against NumPy's own indexing."""

import contextlib
import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.decomposition.box_columns import columns_of, pairs_that_meet, split_runs
from mpi_ckpt.decomposition.boxes import Box, boxes_of_run, grow, intersection, wrapped
from tests.decomposition.drawing import FULL_SHAPES, SHAPES, inner_boxes, slices


def indices_of(shape):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


@given(SHAPES.flatmap(lambda s: st.tuples(st.just(s), inner_boxes(s), inner_boxes(s))))
def test_boxes_meet_where_they_share_elements(drawn):
    shape, a, b = drawn
    array = indices_of(shape)
    shared = np.intersect1d(array[slices(a)], array[slices(b)])
    both = intersection(a, b)
    assert both == intersection(b, a)
    assert (both is None) == (len(shared) == 0)
    if both is not None:
        assert array[slices(both)].ravel().tolist() == shared.tolist()


@st.composite
def runs(draw):
    shape = draw(FULL_SHAPES)
    box = draw(inner_boxes(shape))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, box.size)] * 2)))
    return shape, box, start, stop


@given(runs())
def test_boxes_of_a_run_have_its_elements_in_order(drawn):
    shape, box, start, stop = drawn
    array = indices_of(shape)
    found = boxes_of_run(box, start, stop)
    elements = [array[slices(one)].ravel() for one in found]
    assert np.concatenate([*elements, np.empty(0)]).tolist() == (
        array[slices(box)].ravel()[start:stop].tolist()
    )
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert all(one.size for one in found)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(run_rows(n), min_size=1, max_size=6)))
def test_many_runs_are_cut_as_each_alone(rows):
    shapes, starts, stops = (np.array(column) for column in zip(*rows, strict=True))
    row, offsets, lengths = split_runs(shapes, starts, stops)
    found = [
        [
            Box(tuple(o), tuple(n))
            for r, o, n in zip(row, offsets, lengths, strict=True)
            if r == i
        ]
        for i in range(len(rows))
    ]
    assert (np.diff(row) >= 0).all()
    assert found == [
        boxes_of_run(Box.whole(tuple(shape)), start, stop) for shape, start, stop in rows
    ]


@st.composite
def run_rows(draw, ndim):
    shape = draw(st.lists(st.integers(1, 5), min_size=ndim, max_size=ndim))
    start = draw(st.integers(0, int(np.prod(shape)) - 1))
    return shape, start, draw(st.integers(start + 1, int(np.prod(shape))))


@given(st.data())
def test_a_grown_box_wraps_around_periodic_dimensions(data):
    shape = data.draw(SHAPES)
    box = data.draw(inner_boxes(shape))
    sides = st.tuples(st.integers(0, 9), st.integers(0, 9))
    ghosts = [data.draw(sides) for _ in shape]
    periodic = [data.draw(st.booleans()) for _ in shape]
    array = indices_of(shape)
    grown = grow(box, ghosts)

    outside = np.full(grown.shape, -1)
    expected = np.full(grown.shape, -1)
    for index in np.ndindex(*grown.shape):
        place = [o + i for o, i in zip(grown.offset, index, strict=True)]
        known = zip(place, shape, periodic, strict=True)
        if all(n and (repeats or 0 <= x < n) for x, n, repeats in known):
            expected[index] = array[tuple(x % n for x, n in zip(place, shape, strict=True))]
    for part, inside in wrapped(grown, shape, periodic):
        where = slices(Box(inside, part.shape))
        assert (outside[where] == -1).all()
        outside[where] = array[slices(part)]
        assert part.size
    assert np.array_equal(outside, expected)


def test_a_scalar_is_a_box_too():
    scalar = Box.whole(())
    assert str(scalar) == "[]"
    assert scalar.size == 1
    assert intersection(scalar, scalar) == scalar
    assert boxes_of_run(scalar, 0, 1) == [scalar]
    assert wrapped(grow(scalar, []), (), []) == [(scalar, ())]


@st.composite
def two_lists(draw):
    ndim = draw(st.integers(0, 4))
    shape = draw(st.lists(st.integers(0, 9), min_size=ndim, max_size=ndim))
    lists = [draw(st.lists(inner_boxes(tuple(shape)), max_size=30)) for _ in range(2)]
    return ndim, *lists


def meeting_pairs(a, b):
    pairs = itertools.product(range(len(a)), range(len(b)))
    return [(i, j) for i, j in pairs if intersection(a[i], b[j])]


def joined(a, b, ndim):
    i, j = pairs_that_meet(*columns_of(a, ndim), *columns_of(b, ndim))
    return list(zip(i.tolist(), j.tolist(), strict=True))


@given(two_lists())
def test_pairs_that_meet_are_those_that_share_elements(drawn):
    ndim, a, b = drawn
    assert joined(a, b, ndim) == meeting_pairs(a, b)


@given(two_lists(), st.integers(1, 50), st.integers(1, 40))
def test_dividing_space_neither_loses_nor_doubles_a_pair(drawn, few, chunk):
    ndim, a, b = drawn
    module = "mpi_ckpt.decomposition.box_columns"
    with patched(module, _FEW_PAIRS=few, _CHUNK_PAIRS=chunk):
        assert joined(a, b, ndim) == meeting_pairs(a, b)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_boxes_that_straddle_many_cuts_are_paired_once(ndim):
    random = np.random.default_rng(ndim)
    sides = [random.integers(0, 40, (2, 200, ndim)) for _ in range(2)]
    a, b = [
        [Box(tuple(o), tuple(n // 2)) for o, n in zip(*side, strict=True)] for side in sides
    ]
    with patched("mpi_ckpt.decomposition.box_columns", _FEW_PAIRS=100):
        assert joined(a, b, ndim) == meeting_pairs(a, b)


def test_two_fine_tilings_of_one_domain_are_joined():
    a = grid((4000, 3, 2), (1, 1, 2))
    b = grid((4000, 3, 2), (3, 3, 1))
    i, j = pairs_that_meet(*a, *b)
    elements = np.minimum(a[0][i] + a[1][i], b[0][j] + b[1][j])
    elements -= np.maximum(a[0][i], b[0][j])
    assert (elements > 0).all()
    assert elements.prod(axis=1).sum() == 4000 * 3 * 2
    assert len(i) == 4000 * 3 * 2


def grid(shape, lengths):
    """Return offsets and shapes of a grid of boxes, the last of each row cut short."""
    starts = [range(0, n, step) for n, step in zip(shape, lengths, strict=True)]
    offsets = np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, len(shape))
    return offsets, np.minimum(np.array(shape) - offsets, lengths)


def patched(module, **values):
    """Replace constants of a module for a while."""
    stack = contextlib.ExitStack()
    for name, value in values.items():
        stack.enter_context(mock.patch(f"{module}.{name}", value))
    return stack
