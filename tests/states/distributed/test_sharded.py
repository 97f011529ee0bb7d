# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from mpi_ckpt import Block, ShardedArrayState
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import RegistrationError, StageError, StateMismatchError
from mpi_ckpt.leaves.leaf import LeafSpec


def two_patches() -> dict:
    whole = {"shape": (4, 6), "ghosts": 1}
    return {
        "u": [
            Block(np.zeros((4, 5)), offset=(0, 0), **whole),
            Block(np.zeros((4, 5)), offset=(2, 3), **whole),
        ],
        "p": Block(np.zeros(3, "i2"), shape=(9,), offset=(3,)),
        "absent": [],
    }


SAVED = [
    LeafSpec("absent", "F32", (2,)),
    LeafSpec("u", "F64", (4, 6)),
    LeafSpec("p", "I16", (9,)),
]


def test_each_array_is_a_leaf_cut_into_the_interiors_of_its_blocks():
    captured = ShardedArrayState("s", two_patches()).capture()
    assert captured.structure == {"sharded": 1}
    assert [leaf.spec for leaf in captured.leaves] == [SAVED[2], SAVED[1]]
    p, u = captured.leaves
    assert [tile.box for tile in p.tiles] == [Box((3,), (3,))]
    assert [tile.box for tile in u.tiles] == [Box((0, 0), (2, 3)), Box((2, 3), (2, 3))]
    assert not u.is_concatenated
    assert u.buffer.view() is None


def test_structure_is_the_same_on_a_rank_that_has_nothing():
    nothing = ShardedArrayState("s", {}).capture()
    assert nothing.leaves == ()
    assert nothing.structure == ShardedArrayState("s", two_patches()).capture().structure


def test_places_for_saved_arrays_are_the_blocks_with_their_ghosts():
    state = ShardedArrayState("s", two_patches())
    arrival = state.prepare({"sharded": 1}, SAVED, strict=True)
    absent, u, p = arrival.leaves
    assert absent is None
    assert (arrival.missing, arrival.unexpected) == ((), ())
    assert [tile.box for tile in u.tiles] == [Box((0, 0), (3, 4)), Box((1, 2), (3, 4))]
    assert p.spec == SAVED[2]
    for tile in u.tiles:
        tile.buffer.write(memoryview(np.arange(12.0).tobytes()))
    arrival.adopt()
    first, second = state.blocks["u"]
    assert (first.array[1:, 1:] == np.arange(12.0).reshape(3, 4)).all()
    assert (second.array[:3, :4] == np.arange(12.0).reshape(3, 4)).all()
    assert not first.array[0].any()


@pytest.mark.parametrize("structure", [None, {"concatenated": 1}], ids=["whole", "concat"])
def test_arrays_that_were_saved_otherwise_are_restored_too(structure):
    arrival = ShardedArrayState("s", two_patches()).prepare(structure, SAVED, strict=True)
    assert arrival.leaves[1].tiles is not None


def test_every_difference_is_an_error_at_once():
    saved = [LeafSpec("u", "F32", (4, 6)), LeafSpec("q", "F64", (4, 6))]
    state = ShardedArrayState("s", two_patches())
    with pytest.raises(StateMismatchError) as caught:
        state.prepare({"sharded": 1}, saved, strict=True)
    assert sorted(caught.value.problems) == [
        "s: p I16[9] is in the program, not in the checkpoint",
        "s: u F32[4, 6] is saved, the program has u F64[4, 6]",
    ]
    with pytest.raises(StateMismatchError) as caught:
        state.prepare({"sharded": 1}, saved, strict=False)
    assert caught.value.problems == (
        "s: u F32[4, 6] is saved, the program has u F64[4, 6]",
    )
    arrival = state.prepare({"sharded": 1}, SAVED[:2], strict=False)
    assert arrival.missing == ("p",)


def test_another_whole_shape_is_a_mismatch():
    block = Block(np.zeros(3), shape=(9,), offset=(0,))
    state = ShardedArrayState("s", {"x": block})
    with pytest.raises(StateMismatchError, match=r"x F64\[8\] is saved, .* has x F64\[9\]"):
        state.prepare({"sharded": 1}, [LeafSpec("x", "F64", (8,))], strict=True)


def test_what_was_saved_from_no_arrays_is_refused():
    with pytest.raises(StateMismatchError, match="'s' was not saved from arrays"):
        ShardedArrayState("s", {}).prepare({"ties": {}, "extra": {}}, [], strict=True)


@pytest.mark.parametrize("mode", ["root", "mean"])
def test_modes_that_make_replicas_equal_are_refused(mode):
    with pytest.raises(RegistrationError, match=f"sync is '{mode}', expected 'check' or"):
        ShardedArrayState("s", {}, sync=mode)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"u": np.zeros(3)}, "u is a ndarray, expected a Block or a list of them"),
        ({"u": [np.zeros(3)]}, "u is a ndarray, expected"),
        ({"u": None}, "u is a NoneType, expected"),
        ({3: []}, "3 is no name"),
    ],
)
def test_what_is_no_block_is_refused_at_once_or_at_the_save(blocks, message):
    with pytest.raises(RegistrationError, match=message):
        ShardedArrayState("s", blocks)
    state = ShardedArrayState("s", lambda: blocks)
    with pytest.raises(StageError, match=message):
        state.capture()
    with pytest.raises(StateMismatchError, match=message):
        state.prepare({"sharded": 1}, SAVED, strict=True)


def test_blocks_of_two_arrays_under_one_name_are_refused():
    state = ShardedArrayState("s", {
        "u": [
            Block(np.zeros(3), shape=(9,), offset=(0,)),
            Block(np.zeros(3, "f4"), shape=(9,), offset=(3,)),
        ],
    })  # fmt: skip
    with pytest.raises(StageError, match=r"u has blocks of two arrays: u F64\[9\]"):
        state.capture()


def test_blocks_are_replaced_between_saves():
    state = ShardedArrayState("s", two_patches())
    state.blocks["p"] = Block(np.zeros(4, "i2"), shape=(9,), offset=(5,))
    del state.blocks["u"]
    (leaf,) = state.capture().leaves
    assert leaf.tiles[0].box == Box((5,), (4,))
    swapped = [np.zeros(2), np.ones(2)]
    other = ShardedArrayState(
        "s", lambda: {"x": Block(swapped[0], shape=(2,), offset=(0,))}
    )
    swapped.reverse()
    assert bytes(other.capture().leaves[0].tiles[0].buffer.read()) == np.ones(2).tobytes()


def test_a_tensor_over_a_file_mapped_for_reading_is_refused(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(64))
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), "f4")
    with pytest.warns(UserWarning, match="not writable"):
        tensor = torch.from_numpy(mapped)
    state = ShardedArrayState("s", {"t": Block(tensor, shape=(16,), offset=(0,))})
    with pytest.raises(StageError, match="t has a block in memory that may only be read"):
        state.capture()
