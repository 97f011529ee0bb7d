# SPDX-License-Identifier: Apache-2.0
"""Adds up numbers and arrays by name. Pure."""

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
    """A placeholder for an entry during ``+=``.

    Args:
        key: Of the entry. Attributes:
        key: The same.
        amount: The sum of the added values so far.
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
    """Return a number or an array of numbers for any such value, tensors included.

    Not collective. Thread-safe. Types in which a sum would lose precision, such as those of
    8 and 16 bits that NumPy lacks, become float32, which holds each of their values
    exactly.

    Args:
        key: Key of its entry.
        value: A number or an array or tensor of any number of them.

    Raises:
        TypeError: On the calling rank, if it is no number, or the key is neither text nor
            an integer.
    """
    if not isinstance(key, (str, int)):
        raise TypeError(f"key {key!r}: an accumulator's keys are text or integers")
    if isinstance(value, Update):
        raise TypeError("an accumulator's entries can only be read inside synchronized()")
    if hasattr(value, "detach"):
        value = _array_of(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.isbuiltin == 2:
        value = value.astype(np.float32)  # of other packages, as ml_dtypes' bfloat16
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        value = value.item()
    # A subclass holds more than numbers: a sum would lose a unit or a mask.
    if type(value) in (np.ndarray, np.memmap) and value.dtype.kind in _KINDS:
        return value
    if isinstance(value, (int, float, complex, np.longdouble, np.clongdouble)):
        return value
    raise TypeError(
        f"accumulator[{key!r}]: {type(value).__name__} is not a number or an array of "
        "numbers"
    )


def add_all(totals: Totals, updates: Mapping[Key, Any]) -> None:
    """Add amounts to sums, in place; an existing array is not modified.

    Not collective.

    Args:
        totals: The sums.
        updates: The amounts.

    Raises:
        TypeError: On the calling rank, if an amount is not a number.
        ValueError: On the calling rank, if shapes do not match.
    """
    for key, value in updates.items():
        amount = as_number(key, value)
        totals[key] = totals[key] + amount if key in totals else amount


def from_first_form(pairs: Any) -> Totals:  # noqa: ANN401 (JSON)
    """Read sums in the old form, with arrays within the JSON. Not collective.

    Raises:
        TypeError, ValueError, KeyError: On the calling rank, if they have another form.
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
        # NumPy lacks bfloat16, 8-bit floats and complex numbers of two halves.
        return (tensor.cfloat() if tensor.is_complex() else tensor.float()).numpy()
