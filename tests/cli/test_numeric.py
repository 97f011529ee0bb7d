# SPDX-License-Identifier: Apache-2.0
"""How `diff` measures: every dtype, against torch and against exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpi_ckpt.cli.inspect.changes import Difference, is_numeric, structure_changes
from mpi_ckpt.states.tensors import _DTYPES


def measure(dtype: str, left, right) -> Difference:
    found = Difference(dtype)
    found.add(memoryview(np.asarray(left)).cast("B"), memoryview(right).cast("B"))
    return found


def in_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize(
    "dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "C64", "I32", "U8"]
)
def test_differences_are_those_of_torch(dtype):
    torch.manual_seed(1)
    kind = _DTYPES[dtype]
    made = [torch.randn(3000, dtype=torch.float64) * 40 for _ in range(2)]
    if kind.is_complex:
        made = [torch.complex(tensor, tensor.flip(0)) for tensor in made]
    a, b = (tensor.abs().to(kind) if dtype == "U8" else tensor.to(kind) for tensor in made)
    b[:1000] = a[:1000]
    found = measure(dtype, in_bytes(a), in_bytes(b))
    wide = torch.complex128 if kind.is_complex else torch.float64
    wide_a, wide_b = a.to(wide), b.to(wide)
    apart = (wide_a - wide_b).abs()
    size = torch.maximum(wide_a.abs(), wide_b.abs())
    assert found.max_abs == pytest.approx(float(apart.max()), rel=1e-12)
    assert found.max_rel == pytest.approx(float((apart / size).nan_to_num().max()))
    assert found.differing >= int((wide_a != wide_b).sum())
    assert found.not_finite == 0


@pytest.mark.parametrize(
    "dtype",
    ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F16", "BF16"],
)
def test_every_code_of_a_small_float_is_read_as_torch_reads_it(dtype):
    bits = np.arange(1 << (16 if "F8" not in dtype else 8))
    codes = bits.astype(np.uint8 if "F8" in dtype else np.uint16)
    values = torch.from_numpy(codes.view(np.uint8)).view(_DTYPES[dtype]).to(torch.float32)
    for code, value in zip(codes[::37], values[::37], strict=True):
        found = measure(dtype, codes[:1], np.array([code]))
        zero = float(values[0])
        if not torch.isfinite(value):
            assert found.not_finite == 1, code
        elif code:
            assert found.max_abs == abs(float(value) - zero), code


@pytest.mark.parametrize("dtype", ["I8", "I16", "I32", "I64", "U64"])
def test_integers_are_subtracted_without_overflow(dtype):
    kind = np.dtype(f"{'i' if dtype[0] == 'I' else 'u'}{int(dtype[1:]) // 8}")
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    found = measure(dtype, np.array([low, 5], kind), np.array([high, 5], kind))
    assert found.differing == 1
    assert found.max_abs == float(high - low)


def test_what_is_not_finite_is_counted_and_not_measured():
    left = np.array([1.0, np.nan, np.inf, np.nan, 3.0, -0.0])
    right = np.array([1.5, np.nan, -np.inf, 2.0, np.inf, 0.0])
    found = measure("F64", left, right)
    assert (found.differing, found.not_finite) == (5, 3)
    assert (found.max_abs, found.max_rel) == (0.5, pytest.approx(1 / 3))


def test_numbers_too_far_apart_for_a_float_stay_finite():
    largest = np.finfo(np.float64).max
    found = measure("F64", np.array([largest]), np.array([-largest]))
    assert np.isfinite(found.max_abs)
    assert found.max_rel == 1.0


def test_long_runs_are_taken_in_pieces():
    left = np.zeros(600_000, np.int16)
    right = left.copy()
    right[[0, 300_000, 599_999]] = [1, -7, 3]
    assert measure("I16", left, right).differing == 3
    assert measure("I16", left, right).max_abs == 7
    assert not is_numeric("numpy:<U10")


def test_changes_of_structures_are_named_by_path():
    left = {"a": [1, 2], "b": {"c": None}, "same": "x", "kind": 1}
    right = {"a": [1, 3, 4], "b": {"c": True}, "same": "x", "kind": 1.0}
    assert structure_changes(left, right) == [
        ("a/1", 2, 3), ("a/2", None, 4), ("b/c", None, True), ("kind", 1, 1.0),
    ]  # fmt: skip
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert structure_changes(deep, []) != []
