# SPDX-License-Identifier: Apache-2.0
"""Floating leaves as arrays that MPI can add up. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["from_summable", "to_summable"]

_NATIVE = {"F64": "<f8", "F32": "<f4", "C64": "<c8", "C128": "<c16"}
# A complex half is two of them side by side, and so is the sum of several.
_HALVES = ("F16", "C32")


def to_summable(dtype: str, data: memoryview) -> NDArray[Any]:
    """Return a leaf's bytes as a writable array of a dtype that MPI adds.

    Not collective. Thread-safe.

    Args:
        dtype: One of ``dtypes.FLOATING``.
        data: The bytes; copied.

    Returns:
        1-d; half-precision types become float32.
    """
    summable: NDArray[Any]
    if dtype in _NATIVE:
        summable = np.frombuffer(data, _NATIVE[dtype]).copy()
    elif dtype in _HALVES:
        summable = np.frombuffer(data, "<f2").astype(np.float32)
    else:
        # bfloat16 is the upper half of a float32.
        halves = np.frombuffer(data, "<u2").astype(np.uint32)
        summable = (halves << np.uint32(16)).view(np.float32)
    return summable


def from_summable(dtype: str, array: NDArray[Any]) -> memoryview:
    """Return the bytes of a leaf from an array that `to_summable` made.

    Not collective. Thread-safe. Half-precision types are rounded to nearest even.
    """
    if dtype in _NATIVE:
        plain = array
    elif dtype in _HALVES:
        plain = array.astype("<f2")
    else:
        bits = array.view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = ((bits + half) >> np.uint32(16)).astype("<u2")
        # Rounding would carry a NaN with all bits set over into zero.
        plain = np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
    return np.ascontiguousarray(plain).view(np.uint8).data
