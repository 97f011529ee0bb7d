# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.decomposition.mesh_boxes import MeshCut, cut_runs, mesh_pieces


def chunk(indices: torch.Tensor, parts: int, part: int) -> torch.Tensor:
    chunks = torch.chunk(indices, parts) if len(indices) else ()
    return chunks[part] if part < len(chunks) else indices[:0]


def indices(runs) -> list[int]:
    return [i for start, length in runs for i in range(start, start + length)]


@st.composite
def ordinary_cuts(draw):
    return [
        MeshCut(parts, draw(st.integers(0, parts - 1)))
        for parts in draw(st.lists(st.integers(1, 5), max_size=3))
    ]


@given(st.integers(0, 40), ordinary_cuts())
def test_ordinary_cuts_are_chunks_of_chunks(length, cuts):
    expected = torch.arange(length)
    for cut in cuts:
        expected = chunk(expected, cut.parts, cut.part)
    runs = cut_runs(length, cuts)
    assert indices(runs) == expected.tolist()
    assert len(runs) <= 1


@given(st.integers(0, 40), st.integers(1, 4), st.integers(2, 4))
def test_a_strided_cut_is_made_after_those_to_its_right(length, left, right):
    found = []
    for part in range(left):
        for inner in range(right):
            runs = cut_runs(length, [MeshCut(left, part, right), MeshCut(right, inner)])
            expected = chunk(chunk(torch.arange(length), right, inner), left, part)
            assert indices(runs) == expected.tolist()
            found += indices(runs)
    assert sorted(found) == list(range(length))


@given(st.integers(0, 40), st.integers(1, 4), st.integers(2, 4))
def test_a_lone_strided_cut_joins_the_parts_of_its_pieces(length, parts, strides):
    found = []
    for part in range(parts):
        runs = cut_runs(length, [MeshCut(parts, part, strides)])
        pieces = [chunk(torch.arange(length), strides, i) for i in range(strides)]
        expected = torch.cat([chunk(piece, parts, part) for piece in pieces])
        assert indices(runs) == expected.tolist()
        found += indices(runs)
    assert sorted(found) == list(range(length))


def test_two_strided_cuts_over_an_ordinary_one():
    covered = np.zeros(29, int)
    for a, b, c in np.ndindex(2, 3, 2):
        runs = cut_runs(29, [MeshCut(2, a, 6), MeshCut(3, b, 2), MeshCut(2, c)])
        covered[indices(runs)] += 1
        assert len(runs) <= 1
    assert (covered == 1).all()


def test_pieces_are_the_product_of_the_runs():
    shape, pieces = mesh_pieces((12, 5), ((MeshCut(3, 1, 2),), (MeshCut(2, 1),)))
    assert shape == (4, 2)
    assert [(str(piece.box), piece.place) for piece in pieces] == [
        ("[2:4, 3:5]", (0, 0)),
        ("[8:10, 3:5]", (2, 0)),
    ]
    assert mesh_pieces((), ()) == ((), ((Box((), ()), ()),))
    assert mesh_pieces((3, 0), ((), ()))[1] == ()
    assert mesh_pieces((3,), ((MeshCut(4, 3),),)) == ((0,), ())


def test_a_strided_cut_of_other_pieces_is_unknown():
    with pytest.raises(ValueError, match="cut of 4 pieces, after cuts into 2 parts"):
        cut_runs(24, [MeshCut(3, 0, 4), MeshCut(2, 0)])
