# SPDX-License-Identifier: Apache-2.0
"""Measures how far apart the numbers of two leaves are, a run of bytes at a time. Pure.

The bytes are read by their dtype, even if NumPy has no such type: bfloat16 and the
eight-bit floats are widened first. Integers are subtracted exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.leaves import dtypes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]

# Widened copies of so many elements are small compared with their block.
_ELEMENTS = 1 << 18

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_COMPLEX = {"C128": "<c16", "C64": "<c8"}
_INTEGERS = {
    "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "BOOL": "u1",
}  # fmt: skip
# Exponent bits, fraction bits, bias, and meaning of the largest exponent: "ieee" has
# infinities, "fn" one NaN, "fnuz" one NaN in the place of minus zero.
_EIGHT_BITS = {
    "F8_E4M3": (4, 3, 7, "fn"),
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3FNUZ": (4, 3, 8, "fnuz"),
    "F8_E5M2FNUZ": (5, 2, 16, "fnuz"),
}
_KNOWN = frozenset({*_FLOATS, *_COMPLEX, *_INTEGERS, *_EIGHT_BITS, "BF16", "F8_E8M0"})


def is_numeric(dtype: str) -> bool:
    """Return whether `Difference` can compare elements of a dtype."""
    return dtype in _KNOWN


@dataclass(slots=True)
class Difference:
    """Adds up the differences between two leaves.

    Attributes:
        dtype: The dtype of both, for which `is_numeric` holds.
        differing: Elements whose bits differ.
        max_abs: Largest absolute difference of two finite elements.
        max_rel: Largest difference relative to the larger of the two.
        not_finite: Differing elements that are NaN or infinite on one side or both.
    """

    dtype: str
    differing: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    not_finite: int = 0

    def add(self, left: memoryview, right: memoryview) -> None:
        """Compare two runs of bytes of the same whole number of elements."""
        step = _ELEMENTS * dtypes.element_bytes(self.dtype)
        for start in range(0, len(left), step):
            self._add(left[start : start + step], right[start : start + step])

    def _add(self, left: memoryview, right: memoryview) -> None:
        for a, b in self._differing(left, right):
            if self.dtype in _INTEGERS:
                distance = _subtract_exactly(a, b)
                size = np.maximum(np.abs(a.astype(np.float64)), np.abs(b.astype(float)))
            else:
                with np.errstate(all="ignore"):
                    distance = np.abs(a - b)
                    size = np.maximum(np.abs(a), np.abs(b))
                # The difference of two finite numbers may exceed the largest number.
                finite = np.isfinite(a) & np.isfinite(b)
                self.not_finite += int(np.count_nonzero(~finite))
                distance, size = distance[finite], size[finite]
                distance = np.nan_to_num(distance, posinf=np.finfo(np.float64).max)
            if len(distance):
                self.max_abs = max(self.max_abs, float(distance.max()))
                # Zero and minus zero differ only in their bits.
                relative = np.divide(
                    distance, size, out=np.zeros(len(distance)), where=size > 0
                )
                self.max_rel = max(self.max_rel, float(relative.max()))

    def _differing(
        self, left: memoryview, right: memoryview
    ) -> Iterator[tuple[Array, Array]]:
        width = dtypes.element_bytes(self.dtype)
        a = np.frombuffer(left, np.uint8).reshape(-1, width)
        b = np.frombuffer(right, np.uint8).reshape(-1, width)
        unequal = (a != b).any(axis=1)
        count = int(np.count_nonzero(unequal))
        if count:
            self.differing += count
            with np.errstate(invalid="ignore"):  # a signalling NaN is like any other
                pair = _values(self.dtype, a[unequal]), _values(self.dtype, b[unequal])
            yield pair


def _values(dtype: str, rows: Array) -> Array:
    """Return rows of bytes as numbers: integers unchanged, others widened."""
    flat: Array = np.ascontiguousarray(rows).reshape(-1)
    if dtype in _INTEGERS:
        integers: Array = flat.view(_INTEGERS[dtype])
        return integers
    if dtype in _COMPLEX:
        pairs: Array = flat.view(_COMPLEX[dtype])
        return pairs.astype(np.complex128)
    if dtype == "BF16":
        wide: Array = flat.view("<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).astype(np.float64)
    if dtype == "F8_E8M0":
        exponents = flat.astype(np.float64)
        return np.where(flat == 255, np.nan, np.exp2(exponents - 127))
    if dtype in _EIGHT_BITS:
        return _eight_bit_table(dtype)[flat]
    floats: Array = flat.view(_FLOATS[dtype])
    return floats.astype(np.float64)


def _subtract_exactly(a: Array, b: Array) -> Array:
    # In the unsigned type of the same width, the larger minus the smaller never overflows.
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    upper, lower = np.maximum(a, b).view(unsigned), np.minimum(a, b).view(unsigned)
    distance: Array = upper - lower
    return distance.astype(np.float64)


def _eight_bit_table(dtype: str) -> Array:
    exponent_bits, fraction_bits, bias, special = _EIGHT_BITS[dtype]
    codes = np.arange(256)
    sign = np.where(codes >= 128, -1.0, 1.0)
    exponent = (codes >> fraction_bits) & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
    normal = np.exp2(exponent - float(bias)) * (1 + fraction)
    table: Array = sign * np.where(exponent > 0, normal, np.exp2(1.0 - bias) * fraction)
    if special == "fnuz":
        table[128] = np.nan
    elif special == "fn":
        table[[127, 255]] = np.nan
    else:
        largest = exponent == (1 << exponent_bits) - 1
        table[largest] = np.where(fraction == 0, sign * np.inf, np.nan)[largest]
    return table
