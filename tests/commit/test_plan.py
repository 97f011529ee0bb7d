# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import load

from mpi_ckpt.engine.save.shard import plan_shard
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import Form, LeafSpec
from mpi_ckpt.storage.format.tensorfile import DATA_ALIGNMENT

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
DTYPES = st.sampled_from(
    ["BOOL", "I8", "F8_E4M3", "BF16", "F32", "F64", "C128", "C32", "F4_X2"]
)
SPECS = st.builds(
    LeafSpec, NAMES, DTYPES, st.lists(st.integers(0, 4), max_size=3).map(tuple)
)
STATES = st.lists(
    st.tuples(NAMES, st.lists(SPECS, max_size=5, unique_by=lambda spec: spec.name)),
    max_size=4,
    unique_by=lambda state: state[0],
)


def specs_of(states, plan) -> list[LeafSpec]:
    """Return the specs of a plan's leaves, in file order."""
    specs = [spec for _, of_state in states for spec in of_state]
    return [specs[number] for number in plan.order]


def plan_of(states):
    return plan_shard([(name, Form(specs)) for name, specs in states])


@given(STATES)
def test_leaves_follow_one_another_without_hole_or_overlap(states):
    plan = plan_of(states)
    offset = len(plan.header)
    for at, spec in zip(plan.offsets[plan.order], specs_of(states, plan), strict=True):
        assert at == offset
        offset += spec.nbytes
    assert plan.nbytes == offset
    assert sorted(plan.order) == list(range(sum(len(specs) for _, specs in states)))


@given(STATES)
def test_every_leaf_is_aligned_to_its_elements(states):
    plan = plan_of(states)
    assert len(plan.header) % DATA_ALIGNMENT == 0
    for at, spec in zip(plan.offsets[plan.order], specs_of(states, plan), strict=True):
        assert at % dtypes.element_bytes(spec.dtype) == 0


@given(STATES, st.randoms(use_true_random=False))
def test_safetensors_opens_the_file_and_finds_every_leaf(states, random):
    plan = plan_of(states)
    specs = specs_of(states, plan)
    contents = [random.randbytes(spec.nbytes) for spec in specs]
    found = dict(deserialize(plan.header + b"".join(contents)))
    assert len(found) == len(plan.order)
    # In the header a leaf of a larger type comes first, as in the file.
    for spec, data in zip(specs, contents, strict=True):
        stored_dtype, shape = dtypes.stored_form(spec.dtype, spec.shape)
        named = [k for k in found if k.endswith(f"/{spec.name}")]
        match = [found[k] for k in named if bytes(found[k]["data"]) == data]
        assert any(row["shape"] == list(shape) for row in match), stored_dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F64", "f8"),
        ("F32", "f4"),
        ("F16", "f2"),
        ("I64", "i8"),
        ("U16", "u2"),
        ("BOOL", "?"),
    ],
)
def test_safetensors_reads_equal_arrays(name, dtype):
    array = np.arange(24).astype(dtype).reshape(2, 3, 4)
    plan = plan_of([("m/1", [LeafSpec("w", name, array.shape)])])
    loaded = load(plan.header + array.tobytes())
    assert list(loaded) == ["m%2F1/w"]
    assert loaded["m%2F1/w"].dtype == array.dtype
    assert np.array_equal(loaded["m%2F1/w"], array)


def test_names_that_meet_when_joined_stay_apart():
    leaf = LeafSpec("c", "U8", (1,))
    plan = plan_of([("a/b", [leaf]), ("a", [LeafSpec("b/c", "U8", (1,))])])
    assert set(dict(deserialize(plan.header + b"xy"))) == {"a%2Fb/c", "a/b/c"}


def test_order_is_that_of_the_states_among_equals():
    specs = [LeafSpec(name, "F32", (1,)) for name in "zay"]
    plan = plan_of([("m", specs), ("n", specs)])
    assert list(plan.order) == list(range(6))


def test_no_leaves_make_a_file_that_safetensors_opens():
    plan = plan_of([("empty", [])])
    assert list(plan.order) == []
    assert deserialize(plan.header) == []
