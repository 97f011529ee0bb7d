# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from mpi_ckpt.errors import CorruptGenerationError
from mpi_ckpt.leaves.leaf import Leaf, MemoryBuffer
from mpi_ckpt.states.arrays import array_leaf
from mpi_ckpt.storage.format.tensorfile import (
    encode_header,
    fill_leaves,
    read_form,
    write_leaves,
)


def written(structure, *leaves: Leaf) -> bytes:
    stream = io.BytesIO()
    write_leaves(stream, structure, leaves)
    return stream.getvalue()


def read_from(stream: io.BytesIO):
    structure, specs = read_form(stream)
    targets = [Leaf(spec, MemoryBuffer.empty(spec.nbytes)) for spec in specs]
    fill_leaves(stream, specs, targets)
    return structure, targets


def read(data: bytes):
    return read_from(io.BytesIO(data))


ARRAYS = [
    array_leaf("w", np.arange(6.0).reshape(2, 3)),
    array_leaf("dates", np.array(["2020-01-01"], "M8[D]")),
    array_leaf("none", np.empty((0, 3))),
    array_leaf("__metadata__", np.arange(3)),
    array_leaf("__metadata___", np.arange(4)),
]


@given(st.permutations(ARRAYS), st.integers(0, 5))
def test_leaves_and_structure_return_in_their_order(leaves, count):
    structure = {"a": [1, None, "ä"]}
    found, targets = read(written(structure, *leaves[:count]))
    assert found == structure
    assert [t.spec for t in targets] == [leaf.spec for leaf in leaves[:count]]
    for leaf, target in zip(leaves, targets, strict=False):
        assert bytes(target.buffer.read()) == bytes(leaf.buffer.read())


def test_other_tools_can_read_it():
    loaded = load(written(None, *ARRAYS))
    assert loaded["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(loaded) == len(ARRAYS)


def test_what_follows_is_left_unread():
    stream = io.BytesIO(written(1, ARRAYS[0]) + b"next")
    read_from(stream)
    assert stream.read() == b"next"


def test_leaf_that_nobody_wants_is_passed_over():
    stream = io.BytesIO(written(1, *ARRAYS[:2]))
    _, specs = read_form(stream)
    wanted = Leaf(specs[1], MemoryBuffer.empty(specs[1].nbytes))
    fill_leaves(stream, specs, [None, wanted])
    assert bytes(wanted.buffer.read()) == bytes(ARRAYS[1].buffer.read())


def test_every_truncation_is_told_as_damage():
    data = written({"a": 1}, *ARRAYS[:2])
    for length in range(len(data)):
        with pytest.raises(CorruptGenerationError):
            read(data[:length])


def with_metadata(text: str) -> bytes:
    return encode_header([], {"mpi_ckpt": text})


FORM = {"structure": None, "leaves": []}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (100).to_bytes(8, "little") + b"[]".ljust(100),
        (100).to_bytes(8, "little") + b"{}".ljust(100),
        b"\x80\x04K\x01." + bytes(100),
        encode_header([], {}),
        with_metadata("rubbish"),
        with_metadata("[]"),
        with_metadata("[" * 100_000),
        with_metadata(json.dumps({"leaves": []})),
        with_metadata(json.dumps({"structure": None})),
        with_metadata(json.dumps({**FORM, "leaves": 5})),
        *(
            with_metadata(json.dumps({**FORM, "leaves": [leaf]}))
            for leaf in (
                ["w", "F32"],
                ["w", "F32", [1], 2],
                [5, "F32", [1]],
                ["w", "O", [1]],
                ["w", 5, [1]],
                ["w", ["F32"], [1]],
                ["w", "F32", 5],
                ["w", "F32", [-1]],
                ["w", "F32", [1.5]],
                ["w", "F32", [True]],
                ["w", "F32", ["1"]],
            )
        ),
    ],
    ids=range(23),
)
def test_streams_of_anything_else_are_told_as_damage(data):
    with pytest.raises(CorruptGenerationError, match="not one that a leaf state wrote"):
        read(data)
