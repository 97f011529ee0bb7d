# SPDX-License-Identifier: Apache-2.0
"""Long lists of numbers as one array: as JSON each number would take an entry. Pure."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["as_numbers", "from_numbers"]

_LEAST = 256
"""Shorter ones are no gain: a leaf takes an entry too."""

_DIMS_MAX = 32
_ELEMENTS = {float: np.float64, int: np.int64, bool: np.bool_}


def as_numbers(value: list[Any] | tuple[Any, ...]) -> tuple[NDArray[Any], list[str]] | None:
    """Return a list of numbers as an array, if it is long and all are of one type.

    Not collective. Thread-safe. Also lists of lists of one length, and so on.

    Args:
        value: Any list or tuple.

    Returns:
        The array, and for each of its dimensions whether it is a ``list`` or a ``tuple``;
        None if it cannot be given back as it was.
    """
    shape: list[int] = []
    levels: list[str] = []
    items: Any = [value]
    while True:
        kinds = set(map(type, items))
        if len(kinds) != 1:
            return None
        (kind,) = kinds
        if kind not in (list, tuple):
            break
        lengths = set(map(len, items))
        if len(lengths) != 1 or len(shape) == _DIMS_MAX:  # a list may hold itself
            return None
        shape += lengths
        levels.append(kind.__name__)
        items = list(chain.from_iterable(items))
    if kind not in _ELEMENTS or len(items) < _LEAST:
        return None
    try:
        return np.array(items, _ELEMENTS[kind]).reshape(shape), levels
    except OverflowError:  # an integer of more than 64 bits
        return None


def from_numbers(array: NDArray[Any], levels: list[str]) -> Any:  # noqa: ANN401
    """Return what `as_numbers` made an array of. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if it made none of this form.
    """
    if len(levels) != array.ndim or not {*levels} <= {"list", "tuple"}:
        raise ValueError(f"{levels} are no lists of {array.ndim} dimensions")
    return _rebuild(array.tolist(), levels) if "tuple" in levels else array.tolist()


def _rebuild(items: Any, levels: list[str]) -> Any:  # noqa: ANN401
    first, *rest = levels
    inner = [_rebuild(item, rest) for item in items] if "tuple" in rest else items
    return tuple(inner) if first == "tuple" else inner
