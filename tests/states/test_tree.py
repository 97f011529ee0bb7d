# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections import OrderedDict, defaultdict, deque, namedtuple
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.states.buffers.array_bytes import array_dtype_name
from mpi_ckpt.states.leaf_values import make_value
from mpi_ckpt.states.tree import check_structure, flatten, leaf_nodes, unflatten
from tests.values import VALUES, alike, traits


def through_a_file(value):
    """Take a value apart, write and read both halves, put it together."""
    flattened = flatten(value)
    text = json.dumps(flattened.structure, allow_nan=False, ensure_ascii=False).encode()
    structure = json.loads(text)
    nodes, made = leaf_nodes(structure), {}
    check_structure(structure, [leaf.spec for leaf in flattened.leaves.values()])
    for name, leaf in flattened.leaves.items():
        assert leaf.spec.name == name
        made[name], target = make_value(leaf.spec, nodes[name])
        target.buffer.write(leaf.buffer.read())
    return unflatten(structure, made)


@given(VALUES)
def test_any_nested_value_returns_as_it_was(value):
    assert alike(through_a_file(value), value)


@given(VALUES)
def test_taking_apart_copies_nothing_and_is_the_same_each_time(value):
    first, other = flatten(value), flatten(value)
    assert first.structure == other.structure
    assert list(first.leaves) == list(other.leaves) == list(first.values)
    copied = ("numbers", "bytes", "text")
    assert all(
        first.values[name] is other.values[name]
        for name in first.values
        if first.nodes[name]["~"] not in copied
    )


def test_paths_that_meet_keep_their_leaves_apart():
    value = {"a/b": np.array(1), "a": {"b": np.array(2)}, 1: np.array(3), "1": np.array(4)}
    assert len(flatten(value).leaves) == 4
    assert alike(through_a_file(value), value)


def test_dictionary_with_a_key_leaf_is_a_dictionary():
    value = {"leaf": "oak", "weights": np.arange(3), "more": {"leaf": 5, "w": np.arange(2)}}
    assert alike(through_a_file(value), value)


def test_dictionary_that_looks_like_our_own_nodes_returns():
    value = {"~": "tensor", "leaf": "x", "inner": {"~": "float", "text": "nan"}}
    assert alike(through_a_file(value), value)


def test_same_tensor_twice_is_saved_once_and_stays_shared():
    shared = torch.ones(3)
    flattened = flatten({"a": shared, "b": [shared], "c": torch.ones(3)})
    assert list(flattened.leaves) == ["a", "c"]
    again = through_a_file({"a": shared, "b": [shared], "c": torch.ones(3)})
    assert again["a"] is again["b"][0]
    assert again["a"] is not again["c"]


def test_bound_of_a_deque_is_kept():
    again = through_a_file(deque([1, 2, 3], maxlen=3))
    again.append(4)
    assert list(again) == [2, 3, 4]
    assert through_a_file(deque([1])).maxlen is None
    assert through_a_file(deque(maxlen=0)).maxlen == 0


def test_factory_of_a_defaultdict_is_kept_where_it_has_a_name():
    again = through_a_file(defaultdict(list, {"a": [1]}))
    assert again == {"a": [1]}
    assert again["b"] == []
    with pytest.raises(StageError, match=r"^x is a defaultdict whose factory is .*lambda"):
        flatten({"x": defaultdict(lambda: 5)})


def test_long_lists_of_numbers_are_leaves_and_no_text():
    value = {"floats": [0.1] * 5000, "pairs": [(n, -n) for n in range(1000)]}
    flattened = flatten(value)
    assert {k: leaf.spec.shape for k, leaf in flattened.leaves.items()} == {
        "floats": (5000,),
        "pairs": (1000, 2),
    }
    assert len(json.dumps(flattened.structure)) < 300
    assert alike(through_a_file(value), value)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_sets_within_sets_are_in_one_order_for_any_hashes(hash_seed):
    program = """
import json
from mpi_ckpt.states.tree import flatten
value = {frozenset({"a", "b", ("d", frozenset("xyz"))}), frozenset({"e", "f"}), "g"}
print(json.dumps(flatten(value).structure))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    value = {
        frozenset({"a", "b", ("d", frozenset("xyz"))}),
        frozenset({"e", "f"}),
        "g",
    }
    assert json.loads(done.stdout) == flatten(value).structure


class Metres(np.ndarray):
    """An array that means more than its numbers."""


class Marked(torch.Tensor):
    pass


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop them
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(3.0).view(Metres),
        torch.arange(3.0).as_subclass(Marked),
        torch.ones(2, 2).to_sparse(),
        quantized(),
        torch.ones(2, device="meta"),
        torch.nn.UninitializedParameter(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_come_back_as_something_else_is_refused_by_name(value):
    with pytest.raises(StageError, match="model/weights"):
        flatten({"model": {"weights": value}})


@pytest.mark.parametrize(
    "value", [0.1, -0.0, 1e-320, 5e-324, math.inf, -math.inf, math.nan]
)
def test_floats_return_to_the_last_bit(value):
    again = through_a_file({"x": value, "z": complex(value, -0.0)})
    assert np.float64(again["x"]).tobytes() == np.float64(value).tobytes()
    assert repr(again["z"]) == repr(complex(value, -0.0))


Point = namedtuple("Point", "x y")


class Text(str):
    pass


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Fraction(1, 2),
        Point(1, 2),
        Text("x"),
        lambda: 0,
        int,
        range(3),
        bytearray(2),
    ],
    ids=lambda v: type(v).__name__,
)
def test_unknown_types_are_refused_naming_type_and_place(value):
    name = type(value).__qualname__
    with pytest.raises(StageError, match=rf"^model/2/inner is of type .*{name}"):
        flatten({"model": [0, 1, {"inner": value}]})
    with pytest.raises(StageError, match=name):
        flatten(value)


@pytest.mark.parametrize(
    "value", [np.array([None]), np.ma.masked_array([1], [True])], ids=str
)
def test_arrays_that_are_no_bytes_are_refused_by_name(value):
    with pytest.raises(StageError, match=r"^model/x\b"):
        flatten({"model": {"x": value}})


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype("f8", metadata={"unit": "m"}),
        np.dtype([("a", np.dtype("f8", metadata={"unit": "m"}), (2,))]),
        np.dtype([(("a title", "a"), "f4")]),
        np.dtype([("outer", [(("a title", "a"), "f4")])]),
    ],
    ids=str,
)
def test_dtypes_that_hold_more_than_their_name_says_are_refused(dtype):
    for value in (np.zeros(2, dtype), np.zeros(2, dtype)[0]):
        if isinstance(value, np.float64):
            continue  # without its array it has no metadata either
        with pytest.raises(StageError, match=r"^model/x: .*(metadata|title).* lost"):
            flatten({"model": {"x": value}})


def test_arrays_of_records_that_are_no_recarrays_keep_their_elements_class():
    value = np.zeros(3, np.dtype((np.record, [("a", "<i4")])))
    again = through_a_file({"x": value})["x"]
    assert type(again) is np.ndarray
    assert again.dtype.type is np.record
    assert again[0].a == 0


_ALIGNED = np.dtype([("a", "i1"), ("b", "f8")], align=True)


@pytest.mark.parametrize(
    "dtype",
    [
        _ALIGNED,
        np.dtype((np.record, _ALIGNED)),
        np.dtype([("x", "i1"), ("y", _ALIGNED, (2, 3))]),
        np.dtype([("x", "i1"), ("y", np.dtype((np.record, _ALIGNED)))], align=True),
        np.dtype([("x", [("y", _ALIGNED), ("z", [("a", "<i4")])])]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["array", "Fortran", "recarray", "scalar", "read-only"])
def test_records_stay_aligned_and_of_their_class_at_every_depth(dtype, kind):
    value = np.zeros((2, 3), dtype, order="F" if kind == "Fortran" else "C")
    value.flags.writeable = kind != "read-only"
    if kind == "recarray":
        value = value.view(np.recarray)
    value = value[0, 0] if kind == "scalar" else value
    again = through_a_file({"x": value})["x"]
    assert type(again) is type(value)
    assert again.dtype == value.dtype
    assert traits(again.dtype) == traits(value.dtype)


@pytest.mark.parametrize("records", [[], ["", ""], ["aligned"], [7], 7, {"a": 1}, None])
def test_traits_that_a_dtype_cannot_have_are_refused(records):
    spec = LeafSpec("x", array_dtype_name(np.dtype([("a", "i1"), ("b", "f8")])), (2,))
    with pytest.raises(StateMismatchError, match="x"):
        make_value(spec, {"~": "array", "records": records})


def test_integers_that_python_could_not_read_again_are_refused():
    assert through_a_file([2**13000 - 1]) == [2**13000 - 1]
    with pytest.raises(StageError, match=r"^0/n is an integer of 13001 bits"):
        flatten([{"n": 2**13000}])


@pytest.mark.parametrize(
    "value", ["\ud800", {"\udfff": 1}, {("\ud800",): 1}, ["a", "\udc80"]]
)
def test_text_that_is_not_unicode_is_refused(value):
    with pytest.raises(StageError, match="no text"):
        flatten({"x": value})


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: OrderedDict(a=v)]
)
def test_depth_is_limited_and_what_is_allowed_returns(wrap):
    value = 1
    for _ in range(100):
        value = wrap(value)
    assert alike(through_a_file(value), value)
    with pytest.raises(StageError, match="100 deep"):
        flatten(wrap(value))


def test_cycles_are_refused():
    value: list = []
    value.append(value)
    with pytest.raises(StageError, match="deep"):
        flatten(value)


def test_sets_are_taken_in_one_order():
    first, other = {"a", "b", "c", "d"}, set()
    for item in ("d", "b", "a", "c"):
        other.add(item)
    assert flatten(first).structure == flatten(other).structure


@pytest.mark.parametrize(
    "structure",
    [
        {"~": "object", "text": "x"},
        {"~": "tensor"},
        {"~": "tensor", "leaf": "missing"},
        {"~": "tensor", "leaf": ["x"]},
        {"~": "tuple"},
        {"~": "tuple", "items": 5},
        {"~": "dict", "items": [[1]]},
        {"~": "dict", "items": [[[1], 2]]},
        {"~": "set", "items": [[1]]},
        {"~": "deque", "items": [], "maxlen": "x"},
        {"~": "float", "text": "x"},
        {"~": "float", "text": None},
        {"~": "complex", "parts": [1.0]},
        {"~": "float", "text": "nan", "bits": "3ff0000000000000"},
        {"~": "defaultdict", "items": [], "factory": "eval"},
        {"~": "torch.dtype", "text": "load"},
        {"~": "torch.Size", "items": ["x"]},
        {"~": "numbers", "leaf": "x", "levels": ["list", "list"]},
        {"~": "bytes", "text": "a"},
        {"~": ["list"]},
        {"~": {"~": "dict"}},
    ],
    ids=str,
)
def test_damaged_structures_are_refused(structure):
    leaf_nodes(structure)
    with pytest.raises(StateMismatchError, match="damaged"):
        unflatten([structure], {"x": np.zeros(3)})


def test_structure_nested_without_end_is_refused():
    structure: list = []
    for _ in range(5000):
        structure = [structure]
    assert leaf_nodes(structure) == {}
    with pytest.raises(StateMismatchError, match="damaged"):
        unflatten(structure, {})


def test_only_what_stands_for_bytes_can_be_made():
    for node in ({}, {"~": "object"}, {"~": "tuple"}):
        with pytest.raises(StateMismatchError, match="does not mention it"):
            make_value(LeafSpec("x", "F32", (2,)), node)


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2], "xy", 5, [[0], [1]]])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_layouts_that_are_none_are_refused(kind, order):
    with pytest.raises(StateMismatchError, match="x F32"):
        make_value(LeafSpec("x", "F32", (2, 3)), {"~": kind, "order": order})
