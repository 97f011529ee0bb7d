# SPDX-License-Identifier: Apache-2.0
"""Nested Python values to JSON plus tensors, and back, without pickle.

JSON stands for itself; anything else becomes an object with the key ``"~"`` that names
its kind. Tensors and arrays are replaced by the names of their leaves. The reverse makes
only the kinds listed here, so a hostile file can build nothing else.
"""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.states.arrays import array_leaf, empty_array

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mpi_ckpt.leaf import Leaf, LeafSpec

__all__ = ["Flattened", "flatten", "leaf_kinds", "make_leaf_value", "unflatten"]

KIND = "~"
LEAF_KINDS = ("tensor", "array", "scalar")
_DEPTH_MAX = 100
# Python reads and writes integers of up to 4300 decimal digits.
_INTEGER_BITS_MAX = 13_000
_SMALL = 1 << 62

_SEQUENCES: dict[str, Callable[[list[Any], int | None], Any]] = {
    "tuple": lambda items, _: tuple(items),
    "set": lambda items, _: set(items),
    "frozenset": lambda items, _: frozenset(items),
    "deque": deque,
}
_MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "ordereddict": OrderedDict,
    "counter": lambda pairs: Counter(dict(pairs)),
    # The factory is code and is not saved; whoever needs it sets it again.
    "defaultdict": lambda pairs: defaultdict(None, pairs),
}
_SEQUENCE_KINDS: dict[type, str] = {
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    deque: "deque",
}
_MAPPING_KINDS: dict[type, str] = {
    dict: "dict",
    OrderedDict: "ordereddict",
    Counter: "counter",
    defaultdict: "defaultdict",
}


class Flattened:
    """A nested value taken apart. Not collective.

    Attributes:
        structure: JSON values.
        leaves: Leaf by name, in the order of first appearance.
        values: The live tensor or array behind each leaf.
    """

    def __init__(self) -> None:
        self.structure: Any = None
        self.leaves: dict[str, Leaf] = {}
        self.values: dict[str, Any] = {}
        self._names: dict[int, str] = {}

    def add(self, path: str, kind: str, value: Any, leaf: Leaf) -> dict[str, str]:  # noqa: ANN401
        """Note a tensor; one that was seen before keeps its first name."""
        if id(value) not in self._names:
            name, number = path, 1
            # {"a/b": x, "a": {"b": y}} and {1: x, "1": y} have one path for two.
            while name in self.leaves:
                number += 1
                name = f"{path}#{number}"
            if number > 1:
                leaf = replace(leaf, spec=replace(leaf.spec, name=name))
            self._names[id(value)] = name
            self.leaves[name] = leaf
            self.values[name] = value
        return {KIND: kind, "leaf": self._names[id(value)]}


def flatten(value: Any, prefix: str = "") -> Flattened:  # noqa: ANN401 (any nested value)
    """Take a nested value apart.

    Not collective. Nothing is copied.

    Args:
        value: None, bool, int, float, complex, str, bytes, tensors, NumPy arrays and
            scalars, and lists, tuples, sets, deques and dicts of them.
        prefix: Put before the names of the leaves.

    Raises:
        StageError: On the calling rank, for a value of another type, naming its place.
    """
    flattened = Flattened()
    flattened.structure = _flatten(value, prefix, flattened, 0)
    return flattened


def _flatten(value: Any, path: str, out: Flattened, depth: int) -> Any:  # noqa: ANN401
    if depth > _DEPTH_MAX:
        raise _too_deep(path)
    if value is None or type(value) in (bool, int, str):
        return _plain(value, path)
    if type(value) is float:
        return value if math.isfinite(value) else {KIND: "float", "text": repr(value)}
    if isinstance(value, np.ndarray):
        return out.add(path, "array", value, array_leaf(path, value))
    if isinstance(value, np.generic):
        return out.add(path, "scalar", value, array_leaf(path, np.array(value)))
    if _is_tensor(value):
        from mpi_ckpt.states.tensors import tensor_leaf

        return out.add(path, "tensor", value, tensor_leaf(path, value))
    return _flatten_container(value, path, out, depth + 1)


def _flatten_container(value: Any, path: str, out: Flattened, depth: int) -> Any:  # noqa: ANN401
    def child(key: object, item: Any) -> Any:  # noqa: ANN401
        return _flatten(item, f"{path}/{key}" if path else str(key), out, depth)

    kind = type(value)
    if depth > _DEPTH_MAX and kind in (list, *_SEQUENCE_KINDS) and value:
        raise _too_deep(path)
    if kind is list:
        return [item if _is_small(item) else child(i, item) for i, item in enumerate(value)]
    if kind in _SEQUENCE_KINDS:
        # Sets have no order of their own, and ranks must agree on one.
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        flat = [item if _is_small(item) else child(i, item) for i, item in enumerate(items)]
        node = {KIND: _SEQUENCE_KINDS[kind], "items": flat}
        if kind is deque and value.maxlen is not None:
            node["maxlen"] = value.maxlen
        return node
    if kind is dict and KIND not in value and all(type(key) is str for key in value):
        return {_plain(key, path): child(key, item) for key, item in value.items()}
    if kind in _MAPPING_KINDS:
        pairs = [[child(f"{k}#key", k), child(k, item)] for k, item in value.items()]
        return {KIND: _MAPPING_KINDS[kind], "items": pairs}
    if kind is complex:
        return {KIND: "complex", "text": repr(value)}
    if kind is bytes:
        return {KIND: "bytes", "text": base64.b64encode(value).decode()}
    raise StageError(
        f"{path or 'the value'} is of type {kind.__module__}.{kind.__qualname__}, which "
        "has no safe form on disk; use plain values and arrays, or a State that writes "
        "itself, or ObjectState(..., pickle=True)"
    )


def _too_deep(path: str) -> StageError:
    return StageError(f"{path}: nested more than {_DEPTH_MAX} deep")


def _is_small(value: Any) -> bool:  # noqa: ANN401
    """Whether a value stays as it is: the state of a random stream is hundreds of such."""
    return type(value) is int and -_SMALL <= value <= _SMALL


def _plain(value: Any, path: str) -> Any:  # noqa: ANN401
    """Return None, a bool, an int or text that JSON in UTF-8 can hold."""
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


def unflatten(structure: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 (any nested value)
    """Put a nested value together again.

    Not collective.

    Args:
        structure: What `flatten` made.
        values: Tensor, array or scalar for the name of each leaf.

    Raises:
        StateMismatchError: On the calling rank, if the structure is not of this form.
    """
    try:
        return _unflatten(structure, values)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise StateMismatchError(f"the saved structure is damaged: {error!r}") from error


def _unflatten(node: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    if isinstance(node, list):
        return [_unflatten(item, values) for item in node]
    if not isinstance(node, dict):
        return node
    kind = node.get(KIND)
    if kind is None:
        return {key: _unflatten(item, values) for key, item in node.items()}
    if kind in ("tensor", "array"):
        return values[node["leaf"]]
    if kind == "scalar":
        return values[node["leaf"]][()]
    if kind in _SEQUENCES:
        items = [_unflatten(item, values) for item in node["items"]]
        return _SEQUENCES[kind](items, node.get("maxlen"))
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](
            [(_unflatten(k, values), _unflatten(v, values)) for k, v in node["items"]]
        )
    if kind == "float":
        return float(node["text"])
    if kind == "complex":
        return complex(node["text"])
    if kind == "bytes":
        return base64.b64decode(node["text"])
    raise ValueError(f"unknown kind {kind!r}")


def leaf_kinds(structure: Any) -> dict[str, str]:  # noqa: ANN401 (JSON)
    """Return leaf name -> ``"tensor"``, ``"array"`` or ``"scalar"``. Not collective."""
    kinds: dict[str, str] = {}
    stack = [structure]
    while stack:
        node = stack.pop()
        # A user's own dict may have a key "leaf": only the kind tells.
        if isinstance(node, dict) and node.get(KIND) in LEAF_KINDS:
            kinds[str(node.get("leaf"))] = node[KIND]
        elif isinstance(node, dict):
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return kinds


def make_leaf_value(spec: LeafSpec, kind: str, device: Any = "cpu") -> tuple[Any, Leaf]:  # noqa: ANN401
    """Make an empty tensor or array for a leaf, and the leaf of it.

    Not collective.

    Raises:
        StateMismatchError: On the calling rank, if it cannot be made here.
    """
    if kind == "tensor":
        from mpi_ckpt.states.tensors import empty_tensor, tensor_leaf

        tensor = empty_tensor(spec, device)
        return tensor, tensor_leaf(spec.name, tensor)
    if kind not in ("array", "scalar"):
        raise StateMismatchError(f"{spec}: the saved structure does not mention it")
    array = empty_array(spec)
    return array, array_leaf(spec.name, array)


def _is_tensor(value: object) -> bool:
    # A tensor can only be here if somebody has imported torch.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
