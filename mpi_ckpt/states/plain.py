# SPDX-License-Identifier: Apache-2.0
"""Plain values that JSON has in another form, or not at all."""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict, deque
from typing import Any

from mpi_ckpt.errors import StageError
from mpi_ckpt.states.leaf_values import KIND

__all__ = ["FACTORIES", "checked", "factory_name", "float_node", "float_of", "rank_of"]

# Python reads and writes integers of up to 4300 decimal digits.
_INTEGER_BITS_MAX = 13_000

FACTORIES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
} | {"OrderedDict": OrderedDict, "Counter": Counter, "deque": deque}
"""What may make the missing entries of a defaultdict: the code that has a name."""


def checked(value: Any, path: str) -> Any:  # noqa: ANN401
    """Return None, a bool, an int or text, if JSON in UTF-8 can hold it.

    Not collective. Thread-safe.

    Raises:
        StageError: On the calling rank, if it cannot, naming the place.
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
    """Return the node of a float, as JSON has not all. Not collective. Thread-safe."""
    node = {KIND: "float", "text": repr(value)}
    if math.isnan(value):  # there are many, and which one it is may mean something
        node["bits"] = struct.pack(">d", value).hex()
    return node


def float_of(node: dict[str, Any]) -> float:
    """Return what `float_node` made a node of. Not collective. Thread-safe.

    Raises:
        ValueError: On the calling rank, if it made none of this form.
    """
    bits = node.get("bits")
    if bits is None:
        return float(node["text"])
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    if not math.isnan(value):
        raise ValueError(f"{bits} is a number")
    return float(value)


def rank_of(item: Any) -> str:  # noqa: ANN401
    """Return what puts the items of a set in one order on all ranks.

    Not collective. Thread-safe.

    Not by repr alone: that of a set within a set follows the hashes, which Python draws
    anew in each process.
    """
    if isinstance(item, frozenset):
        return "{" + ",".join(sorted(map(rank_of, item))) + "}"
    if type(item) is tuple:
        return "(" + ",".join(map(rank_of, item)) + ")"
    return f"{type(item).__name__} {item!r}"


def factory_name(factory: object, path: str) -> str:
    """Return the name of a defaultdict's factory in `FACTORIES`. Not collective.

    Raises:
        StageError: On the calling rank, if it is another, naming the place.
    """
    name = getattr(factory, "__name__", "")
    if FACTORIES.get(name) is not factory:
        raise StageError(
            f"{path or 'the value'} is a defaultdict whose factory is {factory!r}: that is "
            f"code and would not come back. Use one of {sorted(FACTORIES)}, or a dict"
        )
    return name
