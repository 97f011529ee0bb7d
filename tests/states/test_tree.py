# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaf import LeafSpec
from mpi_ckpt.states.tree import flatten, leaf_kinds, make_leaf_value, unflatten

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(
    ["~", "leaf", "items", "a", "a/b", "b", "0", "1", "text"]
)
KEYS = st.one_of(
    TEXT, st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), TEXT)
)
ARRAYS = st.integers(0, 99).map(lambda n: np.full((2,), n, np.int16))
TENSORS = st.integers(0, 99).map(lambda n: torch.full((2,), n, dtype=torch.bfloat16))
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.complex_numbers(),
    st.binary(max_size=5),
    TEXT,
    ARRAYS,
    TENSORS,
    st.integers(0, 9).map(np.int32),
    st.floats(width=32).map(np.float32),
)
HASHABLE = st.one_of(st.integers(), st.booleans(), TEXT, st.binary(max_size=3))
VALUES = st.recursive(
    PLAIN | st.sets(HASHABLE, max_size=3) | st.frozensets(HASHABLE, max_size=3),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(0, 4)),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(TEXT, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(TEXT, st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=12,
)


def alike(one, other) -> bool:
    """Compare nested values: also types, order, the sign of zero, and bits of NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(map(repr, one)) == list(map(repr, other)) and all(
            alike(a, b) for a, b in zip(one.values(), other.values(), strict=True)
        )
    if isinstance(one, (list, tuple, deque)):
        same_bound = getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
        return same_bound and len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, (set, frozenset)):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return repr(one) == repr(other)


def through_a_file(value):
    """Take a value apart, write and read both halves, put it together."""
    flattened = flatten(value)
    text = json.dumps(flattened.structure, allow_nan=False, ensure_ascii=False).encode()
    structure = json.loads(text)
    kinds, made = leaf_kinds(structure), {}
    for name, leaf in flattened.leaves.items():
        assert leaf.spec.name == name
        made[name], target = make_leaf_value(leaf.spec, kinds[name])
        target.buffer.write(leaf.buffer.read())
    return unflatten(structure, made)


@given(VALUES)
def test_any_nested_value_returns_as_it_was(value):
    assert alike(through_a_file(value), value)


@given(VALUES)
def test_taking_apart_copies_nothing_and_is_the_same_each_time(value):
    one, other = flatten(value), flatten(value)
    assert one.structure == other.structure
    assert list(one.leaves) == list(other.leaves) == list(one.values)
    assert all(one.values[name] is other.values[name] for name in one.values)


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


def test_factory_of_a_defaultdict_is_code_and_is_not_saved():
    again = through_a_file(defaultdict(list, {"a": [1]}))
    assert type(again) is defaultdict
    assert again.default_factory is None
    assert again == {"a": [1]}


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
def test_arrays_that_are_no_bytes_are_refused(value):
    with pytest.raises(StageError):
        flatten({"x": value})


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
    one, other = {"a", "b", "c", "d"}, set()
    for item in ("d", "b", "a", "c"):
        other.add(item)
    assert flatten(one).structure == flatten(other).structure


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
        {"~": "complex", "text": []},
        {"~": "bytes", "text": "a"},
        {"~": ["list"]},
        {"~": {"~": "dict"}},
    ],
    ids=str,
)
def test_damaged_structures_are_refused(structure):
    leaf_kinds(structure)
    with pytest.raises(StateMismatchError, match="damaged"):
        unflatten([structure], {"x": 1})


def test_structure_nested_without_end_is_refused():
    structure: list = []
    for _ in range(5000):
        structure = [structure]
    assert leaf_kinds(structure) == {}
    with pytest.raises(StateMismatchError, match="damaged"):
        unflatten(structure, {})


def test_only_tensors_arrays_and_scalars_can_be_made():
    for kind in ("", "object", "tuple"):
        with pytest.raises(StateMismatchError, match="does not mention it"):
            make_leaf_value(LeafSpec("x", "F32", (2,)), kind)
