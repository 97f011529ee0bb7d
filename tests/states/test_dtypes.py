# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.leaves import dtypes

SAFETENSORS = [
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "U16",
    "I16",
    "F16",
    "BF16",
    "U32",
    "I32",
    "F32",
    "U64",
    "I64",
    "F64",
]
OTHERS = {
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "F4_X2": 1,
    "C32": 4,
    "C64": 8,
    "C128": 16,
    "numpy:<f16": 16,
    "numpy:<c32": 32,
    "numpy:<M8[ns]": 8,
    "numpy:<m8[25s]": 8,
    "numpy:|S5": 5,
    "numpy:<U10": 40,
}


@pytest.mark.parametrize("name", [*SAFETENSORS, *OTHERS])
def test_known_names_have_a_size(name):
    assert dtypes.is_known(name)
    assert dtypes.element_bytes(name) >= 1
    assert dtypes.nbytes(name, ()) == dtypes.element_bytes(name)
    assert dtypes.nbytes(name, (3, 0)) == 0


@pytest.mark.parametrize("name", [n for n in OTHERS if n.startswith("numpy:")])
def test_sizes_of_numpy_types_are_numpys(name):
    assert dtypes.element_bytes(name) == np.dtype(name.removeprefix("numpy:")).itemsize


@pytest.mark.parametrize(
    "name",
    [
        "",
        "f32",
        "O",
        "F64 ",
        "numpy:O",
        "numpy:|O8",
        "numpy:>f8",
        "numpy:<f8extra",
        "numpy:|S0",
        "numpy:<U0",
        "numpy:|V0",
        "numpy:{}",
        'numpy:{"bytes":4,"fields":[]}',
        'numpy:{"bytes":4,"fields":[["a","<f8",[],0]]}',
        'numpy:{"bytes":8,"fields":[["a","<f4",[],0],["a","<f4",[],4]]}',
        'numpy:{"bytes":8,"fields":[["a","|O8",[],0]]}',
        'numpy:{"bytes":8, "fields":[["a","<f4",[],0]]}',
        'numpy:{"bytes":8,"fields":[["a","<f4",[-2],0]]}',
        'numpy:{"bytes":8,"fields":[["a",' + '["b",' * 50 + "]",
        "numpy:<M8[ns]]",
        "numpy:<M8[" + "n" * 9 + "]",
        "numpy:<U9999999",
        "numpy:<f\u0661\u0666",
    ],
)
def test_other_names_are_unknown(name):
    assert not dtypes.is_known(name)
    with pytest.raises(KeyError):
        dtypes.element_bytes(name)


@given(
    name=st.sampled_from([*SAFETENSORS, *OTHERS]),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
)
def test_stored_form_has_the_same_bytes_under_a_name_that_safetensors_has(name, shape):
    stored, stored_shape = dtypes.stored_form(name, shape)
    assert stored in SAFETENSORS
    assert dtypes.nbytes(stored, stored_shape) == dtypes.nbytes(name, shape)
    assert stored_shape[: len(shape)] == shape
    assert (stored == name) or stored == "U8"


def test_floating_types_are_known():
    assert all(dtypes.is_known(name) for name in dtypes.FLOATING)
    assert not dtypes.FLOATING & {"I64", "BOOL", "U8"}


def test_size_of_a_huge_shape_is_exact():
    assert dtypes.nbytes("F64", (2**62, 2**62)) == math.prod([2**62, 2**62, 8])
