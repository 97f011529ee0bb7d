# SPDX-License-Identifier: Apache-2.0
"""Names and sizes of the element types a leaf can have.

The names are those of the safetensors format; a type it lacks is stored as ``U8`` with
one more dimension, and the manifest keeps the real name (docs/format.md).
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

__all__ = ["FLOATING", "element_bytes", "is_known", "nbytes", "stored_form"]

_SAFETENSORS_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

# Types that some or all safetensors readers do not know.
_OTHER_BYTES = {
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "F4_X2": 1,
    "C32": 4,
    "C64": 8,
    "C128": 16,
}

# NumPy's long doubles, dates and fixed-width strings, under NumPy's own type strings.
# Elements of no width are left out: no shape would say how many there are.
_NUMPY_NAME = re.compile(
    r"numpy:(?:<[fcmMU]|\|S)([1-9][0-9]{0,5})(?:\[[0-9a-zA-Z]{1,8}\])?"
)

FLOATING = frozenset({"F64", "F32", "F16", "BF16", "C32", "C64", "C128"})
"""Types that ``sync="mean"`` averages: those with a precision that an average keeps."""


def is_known(dtype: str) -> bool:
    """Tell whether a dtype name may stand in a manifest. Not collective. Thread-safe."""
    return (
        dtype in _SAFETENSORS_BYTES
        or dtype in _OTHER_BYTES
        or _NUMPY_NAME.fullmatch(dtype) is not None
    )


def element_bytes(dtype: str) -> int:
    """Return the size of one element in bytes.

    Not collective. Thread-safe.

    Args:
        dtype: A name for which `is_known` holds.

    Raises:
        KeyError: On the calling rank, if the name is unknown.
    """
    size = _SAFETENSORS_BYTES.get(dtype) or _OTHER_BYTES.get(dtype)
    if size is not None:
        return size
    match = _NUMPY_NAME.fullmatch(dtype)
    if match is None:
        raise KeyError(dtype)
    width = int(match[1])
    return 4 * width if dtype.startswith("numpy:<U") else width


def stored_form(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and shape under which safetensors readers see a leaf.

    Not collective. Thread-safe.

    Args:
        dtype: A known name.
        shape: Shape in elements.
    """
    if dtype in _SAFETENSORS_BYTES:
        return dtype, shape
    width = element_bytes(dtype)
    return "U8", (*shape, width) if width > 1 else shape


@lru_cache(maxsize=4096)
def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a leaf in bytes. Not collective. Thread-safe."""
    return math.prod(shape) * element_bytes(dtype)
