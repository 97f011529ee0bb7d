# SPDX-License-Identifier: Apache-2.0
"""Turns nested Python values into JSON plus tensors, and back, without pickle.

JSON values stay unchanged; any other value becomes an object with the key ``"~"`` that
names its kind. Tensors, arrays, long lists of numbers and long text are replaced by the
names of their leaves. The reverse makes only the kinds listed here, so a hostile file can
build nothing else. A value that it would change is refused.
"""

from __future__ import annotations

import base64
import math
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.state import Capture
from mpi_ckpt.states.arrays import array_leaf
from mpi_ckpt.states.leaf_values import KIND, describe, is_leaf_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.leaves.leaf import Leaf


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


_LEAF_KINDS = ("tensor", "array", "scalar", "numbers", "bytes", "text")
_DEPTH_MAX = 100
# Longer values become leaves: the manifest is read as a whole, and has a size limit.
_INLINE_BYTES_MAX = 4096

_SEQUENCES: dict[str, Callable[[list[Any], int | None], Any]] = {
    "tuple": lambda items, _: tuple(items),
    "set": lambda items, _: set(items),
    "frozenset": lambda items, _: frozenset(items),
    "deque": deque,
    "torch.Size": lambda items, _: _torch().Size(items),
}
_MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "ordereddict": OrderedDict,
    "counter": lambda pairs: Counter(dict(pairs)),
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
        nodes: The JSON object in place of each leaf.
    """

    def __init__(self) -> None:
        self.structure: Any = None
        self.leaves: dict[str, Leaf] = {}
        self.values: dict[str, Any] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self._names: dict[int, str] = {}

    def add(
        self, path: str, value: object, node: dict[str, Any], leaf: Leaf
    ) -> dict[str, Any]:
        """Add a leaf, and return its node, with its name filled in."""
        name, number = path, 1
        # {"a/b": x, "a": {"b": y}} and {1: x, "1": y} have one path for two values.
        while name in self.leaves:
            number += 1
            name = f"{path}#{number}"
        if number > 1:
            leaf = replace(leaf, spec=replace(leaf.spec, name=name))
        node["leaf"] = name
        # Kept, so that no other value gets its id.
        self._names[id(value)] = name
        self.leaves[name], self.values[name], self.nodes[name] = leaf, value, node
        return node

    def known(self, value: Any) -> dict[str, Any] | None:  # noqa: ANN401
        """Return the node of a value that was already added."""
        name = self._names.get(id(value))
        return None if name is None else self.nodes[name]

    def capture(self) -> Capture:
        """Return the structure and the leaves, by reference."""
        return Capture(self.structure, tuple(self.leaves.values()))


def flatten(value: Any, prefix: str = "") -> Flattened:  # noqa: ANN401 (any nested value)
    """Take a nested value apart.

    Not collective. Only long lists of numbers and long text are copied.

    Args:
        value: None, bool, int, float, complex, str, bytes, tensors, parameters, NumPy
            arrays and scalars, and lists, tuples, sets, deques and dicts of them.
        prefix: Prefix for the names of the leaves.

    Raises:
        StageError: On the calling rank, for a value that a restore would change, with its
            place.
    """
    flattened = Flattened()
    flattened.structure = _flatten(value, prefix, flattened, 0)
    return flattened


def unflatten(structure: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 (any nested value)
    """Rebuild a nested value.

    Not collective.

    Args:
        structure: What `flatten` made.
        values: Name of each leaf -> its tensor or array.

    Raises:
        StateMismatchError: On the calling rank, if the structure is not of this form.
    """
    try:
        return _unflatten(structure, values)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StateMismatchError(f"the saved structure is damaged: {error!r}") from error


def check_structure(structure: Any, specs: Sequence[LeafSpec]) -> None:  # noqa: ANN401 (JSON)
    """Require that `unflatten` can read a structure, before any leaf has arrived.

    Not collective.

    Args:
        structure: The saved structure.
        specs: Specs of the leaves.

    Raises:
        StateMismatchError: On the calling rank, if the structure is not of this form.
    """
    unflatten(structure, {spec.name: spec for spec in specs})


def leaf_nodes(structure: Any) -> dict[str, dict[str, Any]]:  # noqa: ANN401 (JSON)
    """Return for each leaf the JSON object in its place. Not collective."""
    nodes: dict[str, dict[str, Any]] = {}
    stack = [structure]
    while stack:
        node = stack.pop()
        # A user's dict may have a key "leaf": only the kind decides.
        if type(node) is dict:
            if KIND in node and "leaf" in node and node[KIND] in _LEAF_KINDS:
                nodes[str(node["leaf"])] = node
            else:
                stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return nodes


def _flatten(value: Any, path: str, out: Flattened, depth: int) -> Any:  # noqa: ANN401
    if depth > _DEPTH_MAX:
        raise _too_deep(path)
    kind = type(value)
    if value is None or kind in (bool, int):
        return checked(value, path)
    if kind is str:
        return _flatten_text(value, path, out)
    if kind is float:
        return value if math.isfinite(value) else float_node(value)
    if is_leaf_value(value):
        return out.known(value) or out.add(path, value, *_describe(path, value))
    return _flatten_container(value, path, out, depth + 1)


def _flatten_container(value: Any, path: str, out: Flattened, depth: int) -> Any:  # noqa: ANN401
    def child(key: object, item: Any) -> Any:  # noqa: ANN401
        return _flatten(item, f"{path}/{key}" if path else str(key), out, depth)

    kind = type(value)
    if depth > _DEPTH_MAX and kind in (list, *_SEQUENCE_KINDS) and value:
        raise _too_deep(path)
    if kind in (list, tuple):
        numbers = as_numbers(value)
        if numbers is not None:
            array, levels = numbers
            numbers_node: dict[str, Any] = {KIND: "numbers", "levels": levels}
            return out.add(path, array, numbers_node, array_leaf(path, array))
    if kind is list:
        return [item if _is_small(item) else child(i, item) for i, item in enumerate(value)]
    if kind in _SEQUENCE_KINDS:
        # Sets have no order, and ranks must agree on one.
        items = sorted(value, key=rank_of) if kind in (set, frozenset) else value
        flat = [item if _is_small(item) else child(i, item) for i, item in enumerate(items)]
        node = {KIND: _SEQUENCE_KINDS[kind], "items": flat}
        if kind is deque and value.maxlen is not None:
            node["maxlen"] = value.maxlen
        return node
    if kind is dict and KIND not in value and all(type(key) is str for key in value):
        if not "".join(value).isascii():  # one check for all of them: most are names
            for key in value:
                checked(key, path)
        return {key: child(key, item) for key, item in value.items()}
    if kind in _MAPPING_KINDS:
        pairs = [[child(f"{k}#key", k), child(k, item)] for k, item in value.items()]
        node = {KIND: _MAPPING_KINDS[kind], "items": pairs}
        if kind is defaultdict and value.default_factory is not None:
            node["factory"] = factory_name(value.default_factory, path)
        return node
    return _flatten_other(value, path, out)


def _flatten_other(value: Any, path: str, out: Flattened) -> Any:  # noqa: ANN401
    kind = type(value)
    if kind is complex:
        if math.isfinite(value.real) and math.isfinite(value.imag):
            return {KIND: "complex", "text": repr(value)}
        return {KIND: "complex", "parts": [float_node(value.real), float_node(value.imag)]}
    if kind is bytes:
        if len(value) > _INLINE_BYTES_MAX:
            return _add_bytes(out, path, "bytes", value)
        return {KIND: "bytes", "text": base64.b64encode(value).decode()}
    torch = sys.modules.get("torch")
    if torch is not None and kind is torch.Size:
        return {KIND: "torch.Size", "items": list(value)}
    if torch is not None and kind in (torch.dtype, torch.device):
        return {KIND: f"torch.{kind.__name__}", "text": str(value).removeprefix("torch.")}
    raise StageError(
        f"{path or 'the value'} is of type {kind.__module__}.{kind.__qualname__}, which "
        "has no safe form on disk; use plain values and arrays, or a State that writes "
        "itself, or ObjectState(..., pickle=True)"
    )


def _describe(path: str, value: Any) -> tuple[dict[str, Any], Leaf]:  # noqa: ANN401
    try:
        return describe(path, value)
    except StageError:
        raise
    except Exception as error:  # an error of another package's array or tensor
        raise StageError(
            f"{path or 'the value'}, a {type(value).__qualname__}, cannot be saved: "
            f"{error!r}"
        ) from error


def _flatten_text(value: str, path: str, out: Flattened) -> Any:  # noqa: ANN401
    text = checked(value, path)
    if len(text) <= _INLINE_BYTES_MAX:
        return text
    return _add_bytes(out, path, "text", text.encode())


def _add_bytes(out: Flattened, path: str, kind: str, data: bytes) -> dict[str, Any]:
    array = np.frombuffer(data, np.uint8)
    return out.add(path, array, {KIND: kind}, array_leaf(path, array))


def _too_deep(path: str) -> StageError:
    return StageError(f"{path}: nested more than {_DEPTH_MAX} deep")


def _is_small(value: Any) -> bool:  # noqa: ANN401
    """Whether a value stays unchanged, as most values in long lists do."""
    return type(value) is int and abs(value) <= 1 << 62


def _unflatten(node: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    if isinstance(node, list):
        return [_unflatten(item, values) for item in node]
    if not isinstance(node, dict):
        return node
    kind = node.get(KIND)
    if kind is None:
        return {key: _unflatten(item, values) for key, item in node.items()}
    if (kind == "tensor" or kind == "array") and "readonly" not in node:
        return values[node["leaf"]]
    if kind in _LEAF_KINDS and "leaf" in node:
        return _from_leaf(node, values[node["leaf"]])
    if kind in _SEQUENCES:
        items = [_unflatten(item, values) for item in node["items"]]
        return _SEQUENCES[kind](items, node.get("maxlen"))
    if kind in ("defaultdict", *_MAPPINGS):
        pairs = [(_unflatten(k, values), _unflatten(v, values)) for k, v in node["items"]]
        if kind == "defaultdict":
            factory = node.get("factory")
            return defaultdict(None if factory is None else FACTORIES[factory], pairs)
        return _MAPPINGS[kind](pairs)
    if kind == "float":
        return float_of(node)
    if kind == "complex":
        if "text" in node:
            return complex(node["text"])
        return complex(*map(float_of, node["parts"]))
    if kind == "bytes":
        return base64.b64decode(node["text"])
    if kind == "torch.device":
        return _torch().device(node["text"])
    if kind == "torch.dtype":
        found = getattr(_torch(), node["text"])
        if isinstance(found, _torch().dtype):
            return found
    raise ValueError(f"unknown kind {kind!r}")


def _from_leaf(node: dict[str, Any], value: Any) -> Any:  # noqa: ANN401
    kind = node[KIND]
    if isinstance(value, LeafSpec):  # only a form is checked, and no value is used
        if kind == "numbers":
            from_numbers(np.zeros([0] * len(value.shape)), node["levels"])
        return 0
    if kind == "scalar":
        return value[()]
    if kind == "numbers":
        return from_numbers(value, node["levels"])
    if kind == "bytes":
        return value.tobytes()
    if kind == "text":
        return value.tobytes().decode()
    if kind == "array" and node.get("readonly") and value.flags.writeable:
        value.flags.writeable = False
    return value


def _torch() -> Any:  # noqa: ANN401
    import torch

    return torch
