# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt import ConcatState
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import (
    RegistrationError,
    RestoreError,
    StageError,
    StateMismatchError,
)
from mpi_ckpt.leaves.leaf import LeafSpec
from tests.making import Ranks

STRUCTURE = {"concatenated": 1}


def columns(rows: int) -> dict:
    return {
        "x": np.arange(3.0 * rows).reshape(rows, 3),
        "id": np.arange(rows, dtype=">u4"),
        "spin": torch.arange(rows, dtype=torch.bfloat16),
    }


SAVED = [
    LeafSpec("id", "U32", (7,)),
    LeafSpec("spin", "BF16", (7,)),
    LeafSpec("x", "F64", (7, 3)),
]


def bound(state: ConcatState, rank: int, size: int) -> ConcatState:
    state.bind(Ranks(rank, size))
    return state


@pytest.mark.parametrize("rows", [0, 4])
def test_each_column_is_a_tile_of_the_ranks_own_rows(rows):
    captured = ConcatState("p", columns(rows)).capture()
    assert captured.structure == STRUCTURE
    assert [leaf.spec for leaf in captured.leaves] == [
        LeafSpec("id", "U32", (rows,)),
        LeafSpec("spin", "BF16", (rows,)),
        LeafSpec("x", "F64", (rows, 3)),
    ]
    for leaf in captured.leaves:
        assert leaf.is_concatenated
        assert [tile.box for tile in leaf.tiles] == [Box.whole(leaf.spec.shape)]
    (tile,) = captured.leaves[0].tiles
    assert bytes(tile.buffer.read()) == np.arange(rows, dtype="<u4").tobytes()


@given(st.integers(0, 9), st.integers(1, 4))
def test_rows_are_dealt_out_evenly_into_new_arrays(rows, size):
    saved = [LeafSpec("x", "F64", (rows, 3))]
    whole = np.arange(rows * 3.0).reshape(rows, 3)
    parts = []
    for rank in range(size):
        before = np.zeros((2, 3))
        state = bound(ConcatState("p", {"x": before}), rank, size)
        arrival = state.prepare(STRUCTURE, saved, strict=True)
        (leaf,) = arrival.leaves
        (tile,) = leaf.tiles
        assert leaf.spec == saved[0]
        start, end = tile.box.offset[0], tile.box.end[0]
        view = tile.buffer.view()
        view[:] = whole[start:end].tobytes()
        assert state.arrays["x"] is before
        arrival.adopt()
        parts.append(state.arrays["x"])
        assert not before.any()
    assert (np.concatenate(parts) == whole).all()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_new_columns_are_of_the_same_kind():
    state = bound(ConcatState("p", columns(0)), 1, 2)
    state.prepare(STRUCTURE, SAVED, strict=True).adopt()
    arrays = state.arrays
    assert arrays["x"].shape == (4, 3)
    assert (arrays["id"].dtype, arrays["id"].shape) == (np.dtype(">u4"), (4,))
    assert (arrays["spin"].dtype, arrays["spin"].shape) == (torch.bfloat16, (4,))
    fields = np.zeros(2, [("a", "i4"), ("b", "f8")]).view(np.recarray)
    made = ConcatState("p", {"r": fields}).make_columns(3)["r"]
    assert (type(made), made.shape, made.dtype) == (np.recarray, (3,), fields.dtype)


def test_every_difference_is_an_error_at_once():
    state = ConcatState("p", columns(5))
    saved = [
        LeafSpec("id", "U32", (6,)),
        LeafSpec("x", "F64", (7, 2)),
        LeafSpec("v", "F64", (7, 2)),
    ]
    with pytest.raises(StateMismatchError) as caught:
        state.prepare(STRUCTURE, saved, strict=True)
    assert caught.value.problems == (
        "p: x F64[7, 2] is saved, the program has x F64[5, 3]: only the rows may differ",
        "p: spin BF16[5] is in the program, not in the checkpoint",
        "p: v F64[7, 2] is saved, the program has no such column",
        "p: x F64[7, 2] is saved with other rows than id U32[6]",
    )
    with pytest.raises(
        StateMismatchError, match=r"x F64.* is saved, the program has x F64"
    ):
        state.prepare(STRUCTURE, [LeafSpec("x", "F64", ())], strict=False)


def test_a_column_that_only_the_checkpoint_has_is_left_out_if_the_program_asks():
    state = ConcatState("p", {"id": np.zeros(2, "u4")})
    arrival = state.prepare(STRUCTURE, SAVED, strict=False)
    assert [leaf is None for leaf in arrival.leaves] == [False, True, True]
    assert arrival.unexpected == ("spin", "x")
    with pytest.raises(StateMismatchError, match=r"spin BF16.*no such column"):
        state.prepare(STRUCTURE, SAVED, strict=True)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": [1.0]}, "x is a list, expected a NumPy array or a torch tensor"),
        ({"x": np.float64(1)}, "x is a NumPy scalar"),
        ({"x": np.zeros(())}, "x has no rows"),
        ({"x": torch.zeros(3).to_sparse()}, "x has no plain memory: .*only dense tensors"),
    ],
)
def test_what_is_no_column_is_refused_at_once_or_at_the_save(arrays, message):
    with pytest.raises(RegistrationError, match=message):
        ConcatState("p", arrays)
    state = ConcatState("p", lambda: arrays)
    with pytest.raises(StageError, match=message):
        state.capture()
    with pytest.raises(StateMismatchError, match=message):
        state.prepare(STRUCTURE, SAVED, strict=True)


def test_columns_of_different_rows_are_refused():
    state = ConcatState("p", {"x": np.zeros(3), "y": np.zeros(4)})
    with pytest.raises(StageError, match="y has 4 rows, x has 3"):
        state.capture()


def test_a_function_is_called_at_each_save_and_the_state_holds_what_was_restored():
    arrays = {"x": np.zeros((2, 3))}
    state = ConcatState("p", lambda: arrays)
    state.capture()
    assert state.arrays["x"] is arrays["x"]
    arrays["x"] = np.zeros((5, 3))
    (leaf,) = state.capture().leaves
    assert leaf.spec.shape == (5, 3)
    state.prepare(STRUCTURE, [LeafSpec("x", "F64", (4, 3))], strict=True).adopt()
    assert state.arrays["x"].shape == (4, 3)


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_route_is_called_in_chunks_and_gives_a_rank_for_each_row(make):
    rows = (1 << 17) + 5
    called = []

    def route(chunk):
        called.append(len(chunk["x"]))
        return chunk["x"] % 3

    state = bound(ConcatState("p", {"x": make(np.zeros(0, "i4"))}, route=route), 0, 3)
    ranks = state.routed({"x": make(np.arange(rows, dtype="i4"))})
    assert (ranks == np.arange(rows) % 3).all()
    assert ranks.dtype == np.intp
    assert called == [1 << 16, 1 << 16, 5]
    assert len(state.routed({"x": make(np.zeros(0, "i4"))})) == 0
    assert len(called) == 3


@pytest.mark.parametrize("make", [np.array, torch.as_tensor])
def test_a_route_that_changes_rows_is_an_error(make):
    """It has the rows themselves: positions wrapped in place would come back wrapped."""

    def route(chunk):
        chunk["x"] %= 7
        return np.zeros(len(chunk["x"]), int)

    columns = {"x": make(np.arange(80_000)), "y": make(np.arange(80_000))}
    state = bound(ConcatState("p", columns, route=route), 0, 3)
    with pytest.raises(RestoreError, match=r"route has changed x in rows 0 to 65535"):
        state.routed(columns)
    assert len(state.routed({"x": make(np.arange(7)), "y": columns["y"][:7]})) == 7


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (
            lambda c: np.where(c["x"] == 70_000, 3, 0),
            "row 70000 of .* to rank 3, expected 0",
        ),
        (
            lambda c: np.where(c["x"] == 2, -1, 0),
            "row 2 of .* to rank -1, expected 0 to 2",
        ),
        (
            lambda c: c["x"] * 0.0,
            "float64 of shape .* rows 0 to 65535, expected an int",
        ),
        (lambda c: [0], r"shape \(1,\) for rows 0 to 65535, .* each of these 65536 rows"),
        (lambda c: None, r"object of shape \(\)"),
        (lambda c: np.zeros((len(c["x"]), 1), int), r"int64 of shape \(65536, 1\)"),
        (lambda c: c["x"] > 3, "bool of shape"),
    ],
)
def test_a_route_that_gives_no_ranks_is_an_error(route, message):
    state = bound(ConcatState("p", {"x": np.zeros(0, "i4")}, route=route), 0, 3)
    with pytest.raises(RestoreError, match=f"state 'p': route .*{message}"):
        state.routed({"x": np.arange(80_000, dtype="i4")})
