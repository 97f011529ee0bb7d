# SPDX-License-Identifier: Apache-2.0
"""The text pictures of tiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.cli.inspect.tile_maps import draw, sections_of, symbol
from mpi_ckpt.decomposition.boxes import Box


def inner(lines: list[str]) -> list[str]:
    """Return a picture without its frame, which must be whole."""
    width = len(lines[0])
    assert {len(line) for line in lines} == {width}
    assert lines[0] == f"┌{'─' * (width - 2)}┐"
    assert lines[-1] == f"└{'─' * (width - 2)}┘"
    assert all(line[0] == line[-1] == "│" for line in lines[1:-1])
    return [line[1:-1] for line in lines[1:-1]]


def test_a_row_is_drawn_as_one_line():
    (section,) = sections_of((4,), [(Box((0,), (1,)), 3), (Box((1,), (3,)), 5)])
    assert section.title == "elements 0:4"
    assert inner(draw(section, 60, 20)) == ["3" * 8 + "5" * 24]
    assert inner(draw(section, 4, 20)) == ["3555"]


def test_a_plane_is_drawn_with_two_characters_an_element():
    tiles = [
        (Box((0, 0), (1, 2)), 0),
        (Box((1, 0), (2, 2)), 1),
        (Box((0, 2), (3, 1)), 36),
    ]
    (section,) = sections_of((3, 3), tiles)
    assert section.title == "dimension 0 down, 0:3; dimension 1 across, 0:3"
    assert inner(draw(section, 60, 20)) == ["0000AA", "1111AA", "1111AA"]


def test_a_plane_too_large_is_drawn_smaller():
    tiles = [(Box((0, 0), (500, 1000)), 0), (Box((500, 0), (500, 1000)), 1)]
    (section,) = sections_of((1000, 1000), tiles)
    assert inner(draw(section, 60, 20)) == ["0" * 60] * 10 + ["1" * 60] * 10


def test_a_cube_is_cut_where_it_has_the_fewest_sections():
    tiles = [
        (Box((0, 0, 0), (2, 4, 3)), 0),
        (Box((2, 0, 0), (2, 2, 3)), 1),
        (Box((2, 2, 0), (2, 2, 3)), 2),
    ]
    (section,) = sections_of((4, 4, 3), tiles)
    assert section.title.startswith("dimension 2 at 0:3; dimension 0 down")
    assert inner(draw(section, 60, 20)) == ["0" * 8] * 2 + ["11112222"] * 2


def test_a_cube_of_many_layers_shows_four_of_them():
    tiles = [
        (Box((x, y, z), (1, 1, 1)), x) for x in range(9) for y in range(9) for z in range(9)
    ]
    sections = sections_of((9, 9, 9), tiles)
    titles = [one.title.split(";")[0] for one in sections]
    assert titles == ["dimension 0 at 0:1", "dimension 0 at 3:4", "dimension 0 at 6:7"]
    assert inner(draw(sections[1], 60, 20)) == ["3" * 18] * 9


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 2, 2, 2)])
def test_arrays_that_no_plane_shows_have_no_section(shape):
    assert sections_of(shape, [(Box.whole(shape), 0)]) == []


def test_symbols_repeat_after_the_last():
    assert [symbol(n) for n in (0, 9, 10, 35, 36, 61, 62)] == list("09azAZ0")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 100))
def test_every_character_is_that_of_the_element_in_its_middle(rows, width):
    starts = [sum(rows[:n]) for n in range(len(rows))]
    tiles = [
        (Box((start,), (n,)), number)
        for number, (start, n) in enumerate(zip(starts, rows, strict=True))
    ]
    owners = "".join(symbol(number) * n for number, n in enumerate(rows))
    (section,) = sections_of((sum(rows),), tiles)
    (line,) = inner(draw(section, width, 1))
    assert len(line) <= width
    for cell, character in enumerate(line):
        middle = (2 * cell + 1) * sum(rows) // (2 * len(line))
        assert character == owners[middle]
