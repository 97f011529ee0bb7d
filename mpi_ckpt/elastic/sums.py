# SPDX-License-Identifier: Apache-2.0
"""Numbers and arrays under names, added up. Pure."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

Key = str | int
Totals = dict[Key, Any]

_KINDS = "biufc"


class Update:
    """Stands for an entry that is being added to.

    Args:
        key: Of the entry.

    Attributes:
        key: The same.
        amount: What was added so far.
    """

    __slots__ = ("amount", "key")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.amount: Any = 0

    def __add__(self, value: Any) -> Update:  # noqa: ANN401
        self.amount = self.amount + as_number(self.key, value)
        return self

    def __sub__(self, value: Any) -> Update:  # noqa: ANN401
        self.amount = self.amount - as_number(self.key, value)
        return self


def as_number(key: object, value: Any) -> Any:  # noqa: ANN401
    """Return a number or an array of numbers for anything like it, tensors included.

    Not collective. Thread-safe. What no sum could be kept in without loss, as of 8 and 16
    bits that NumPy does not know, becomes float32, which holds each of them exactly.

    Args:
        key: Of the entry it is meant for.
        value: A number or an array or tensor of any number of them.

    Raises:
        TypeError: On the calling rank, if it is none, or the key is neither text nor an
            integer.
    """
    if not isinstance(key, (str, int)):
        raise TypeError(f"key {key!r}: an accumulator's keys are text or integers")
    if isinstance(value, Update):
        raise TypeError("an accumulator's entries can only be read inside synchronized()")
    if hasattr(value, "detach"):
        value = _array_of(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.isbuiltin == 2:
        value = value.astype(np.float32)  # registered by others, as ml_dtypes' bfloat16
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        value = value.item()
    # A subclass is more than its numbers: a unit or a mask would get lost in a sum.
    if type(value) in (np.ndarray, np.memmap) and value.dtype.kind in _KINDS:
        return value
    if isinstance(value, (int, float, complex, np.longdouble, np.clongdouble)):
        return value
    raise TypeError(
        f"accumulator[{key!r}]: {type(value).__name__} is no number or array of them"
    )


def add_all(totals: Totals, updates: Mapping[Key, Any]) -> None:
    """Add amounts to sums, in place; an array that is there already is not changed.

    Not collective.

    Args:
        totals: The sums.
        updates: The amounts.

    Raises:
        TypeError: On the calling rank, if an amount is no number.
        ValueError: On the calling rank, if shapes do not go together.
    """
    for key, value in updates.items():
        amount = as_number(key, value)
        totals[key] = totals[key] + amount if key in totals else amount


def from_first_form(pairs: Any) -> Totals:  # noqa: ANN401 (JSON)
    """Read sums in the form that had arrays within the JSON. Not collective.

    Raises:
        TypeError, ValueError, KeyError: On the calling rank, if they are not of it.
    """
    return {key: _from_json(value) for key, value in pairs}


def _from_json(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    array = np.frombuffer(base64.b64decode(value["array"]), np.dtype(value["dtype"]))
    return array.reshape(value["shape"]).copy()


def _array_of(tensor: Any) -> Any:  # noqa: ANN401
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:
        # bfloat16, 8-bit floats, complex numbers of two halves: NumPy has none of them.
        return (tensor.cfloat() if tensor.is_complex() else tensor.float()).numpy()
