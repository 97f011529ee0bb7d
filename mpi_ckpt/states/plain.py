# SPDX-License-Identifier: Apache-2.0
"""Encodes plain values that JSON changes or lacks. Pure.

A long list of numbers becomes one array: in JSON each number would be an entry.
"""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict, deque
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.errors import StageError
from mpi_ckpt.states.leaf_values import KIND

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Python reads and writes integers of up to 4300 decimal digits.
_INTEGER_BITS_MAX = 13_000

FACTORIES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
} | {"OrderedDict": OrderedDict, "Counter": Counter, "deque": deque}
"""What may make the missing entries of a defaultdict: the code that has a name."""


def checked(value: Any, path: str) -> Any:  # noqa: ANN401
    """Return a value (None, bool, int or text) if JSON in UTF-8 can hold it.

    Not collective. Thread-safe.

    Raises:
        StageError: On the calling rank, if it cannot, with the place.
    """
    if type(value) is int and value.bit_length() > _INTEGER_BITS_MAX:
        raise StageError(
            f"{path or 'the value'} is an integer of {value.bit_length()} bits, at most "
            f"{_INTEGER_BITS_MAX} can be read again"
        )
    if type(value) is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise StageError(f"{path or 'the value'} is no text: {error}") from error
    return value


def float_node(value: float) -> dict[str, str]:
    """Return the node of a float that JSON lacks. Not collective. Thread-safe."""
    node = {KIND: "float", "text": repr(value)}
    if math.isnan(value):  # there are many, and their bits may have a meaning
        node["bits"] = struct.pack(">d", value).hex()
    return node


def float_of(node: dict[str, Any]) -> float:
    """Return the float of a node that `float_node` made. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if the form is another one.
    """
    bits = node.get("bits")
    if bits is None:
        return float(node["text"])
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    if not math.isnan(value):
        raise ValueError(f"{bits} is a number")
    return float(value)


def rank_of(item: Any) -> str:  # noqa: ANN401
    """Return a sort key that orders the items of a set alike on all ranks.

    Not collective. Thread-safe.

    Not repr alone: the repr of a set within a set follows the hashes, which Python
    randomizes in each process.
    """
    if isinstance(item, frozenset):
        return "{" + ",".join(sorted(map(rank_of, item))) + "}"
    if type(item) is tuple:
        return "(" + ",".join(map(rank_of, item)) + ")"
    return f"{type(item).__name__} {item!r}"


def factory_name(factory: object, path: str) -> str:
    """Return the name of a defaultdict's factory in `FACTORIES`. Not collective.

    Raises:
        StageError: On the calling rank, if it is another one, with the place.
    """
    name = getattr(factory, "__name__", "")
    if FACTORIES.get(name) is not factory:
        raise StageError(
            f"{path or 'the value'} is a defaultdict whose factory is {factory!r}: that is "
            f"code and would not come back. Use one of {sorted(FACTORIES)}, or a dict"
        )
    return name


_LEAST = 256
"""Shorter ones are no gain: a leaf takes an entry too."""

_DIMS_MAX = 32
_ELEMENTS = {float: np.float64, int: np.int64, bool: np.bool_}


def as_numbers(value: list[Any] | tuple[Any, ...]) -> tuple[NDArray[Any], list[str]] | None:
    """Return a list of numbers as an array, if it is long and has one type.

    Not collective. Thread-safe. Also nested lists of equal lengths.

    Args:
        value: Any list or tuple.

    Returns:
        The array, and for each of its dimensions whether it is a ``list`` or a ``tuple``;
        None if a restore would change it.
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
        if len(lengths) != 1 or len(shape) == _DIMS_MAX:  # a list may contain itself
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
    """Return the list of an array that `as_numbers` made. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if the form is another one.
    """
    if len(levels) != array.ndim or not {*levels} <= {"list", "tuple"}:
        raise ValueError(f"{levels} are no lists of {array.ndim} dimensions")
    return _rebuild(array.tolist(), levels) if "tuple" in levels else array.tolist()


def _rebuild(items: Any, levels: list[str]) -> Any:  # noqa: ANN401
    first, *rest = levels
    inner = [_rebuild(item, rest) for item in items] if "tuple" in rest else items
    return tuple(inner) if first == "tuple" else inner
