# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from mpi_ckpt.engine.sync.sending import from_summable, to_summable
from mpi_ckpt.leaves import dtypes

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize(
    ("name", "dtype"), [("F64", "f8"), ("F32", "f4"), ("C64", "c8"), ("C128", "c16")]
)
def test_native_types_go_through_bit_for_bit(name, dtype):
    array = np.random.default_rng(0).normal(size=20).astype(dtype)
    array[:4] = [np.nan, -0.0, np.inf, -np.inf]
    summable = to_summable(name, memoryview(array).cast("B"))
    assert summable.dtype == array.dtype
    assert bytes(from_summable(name, summable)) == array.tobytes()


@pytest.mark.parametrize("name", sorted(dtypes.FLOATING))
def test_result_is_a_writable_copy(name):
    data = bytearray(32)
    summable = to_summable(name, memoryview(data))
    summable += 1
    assert data == bytearray(32)
    assert len(from_summable(name, summable)) == 32


@pytest.mark.parametrize(
    ("name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_half_precision_widens_exactly_and_returns(name, dtype):
    halves = torch.from_numpy(EVERY_HALF.copy()).view(dtype)
    summable = to_summable(name, memoryview(EVERY_HALF).cast("B"))
    assert summable.dtype == np.float32
    expected = halves.float().numpy()
    assert np.array_equal(summable, expected, equal_nan=True)
    again = np.frombuffer(from_summable(name, summable), np.uint16)
    numbers = ~np.isnan(expected)
    assert np.array_equal(again[numbers], EVERY_HALF[numbers])
    back = torch.from_numpy(again.copy()).view(dtype).float().numpy()
    assert np.isnan(back[~numbers]).all()


def test_bfloat16_rounds_as_torch_does():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    borders = (EVERY_HALF.astype(np.uint32) << np.uint32(16))[:, None] + np.array(
        [0x7FFF, 0x8000, 0x8001], np.uint32
    )
    floats = np.concatenate([bits, borders.reshape(-1)]).view(np.float32)
    floats = floats[~np.isnan(floats)]
    ours = np.frombuffer(from_summable("BF16", floats.copy()), np.int16)
    torchs = torch.from_numpy(floats.copy()).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(ours, torchs)


def test_no_elements_are_no_trouble():
    for name in dtypes.FLOATING:
        assert len(from_summable(name, to_summable(name, memoryview(b"")))) == 0


def test_complex_halves_are_averaged_as_two_halves():
    parts = np.array([0.5, -2, np.inf, 7], np.float16)
    summable = to_summable("C32", memoryview(parts).cast("B"))
    assert summable.tolist() == parts.tolist()
    assert bytes(from_summable("C32", summable)) == parts.tobytes()
