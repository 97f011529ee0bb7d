# SPDX-License-Identifier: Apache-2.0
"""Describes the live value of a leaf, and makes a new value from that description.

The leaf's node, a JSON object, holds what the bytes do not: the kind of value, its memory
layout, whether it is a parameter. A value is refused, by name, if a node cannot describe
all of it.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaves.leaf import Tile
from mpi_ckpt.leaves.tiles import cut_leaf
from mpi_ckpt.states.arrays import array_leaf, empty_array
from mpi_ckpt.states.buffers.array_bytes import (
    LITTLE,
    Layout,
    layout_of,
    overlaps_itself,
    traits_of,
    unnamed_part,
    with_traits,
)

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from types import ModuleType

    from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, TileBuffer

_NUMPY = (np.ndarray, np.generic)

KIND = "~"
"""The key that tells a node from a dict of the user's."""


def is_leaf_value(value: object) -> bool:
    """Return whether a value is an array, a NumPy scalar or a tensor. Not collective."""
    kind = type(value)
    return kind is np.ndarray or isinstance(value, _NUMPY) or _is_tensor(value)


def describe(name: str, value: Any) -> tuple[dict[str, Any], Leaf]:  # noqa: ANN401
    """Return the node of a value, and the leaf of its bytes.

    Not collective. Only scalars are copied.

    Args:
        name: Name of the leaf.
        value: A value for which `is_leaf_value` holds.

    Raises:
        StageError: On the calling rank, if a restore could not make it again unchanged.
    """
    if type(value) is np.ndarray and value.flags.carray:
        dtype = value.dtype
        if dtype in LITTLE and dtype.metadata is None:
            # Almost all values are such arrays, which need no further description.
            return {KIND: "array"}, array_leaf(name, value)
    if _is_tensor(value):
        return _describe_tensor(name, value)
    if isinstance(value, np.generic):
        node = {KIND: "scalar"}
        if isinstance(value, np.record):
            node["class"] = "recarray"
        array = np.array(value)
        _require_named(name, array.dtype)
        return node | _traits_node(array.dtype), array_leaf(name, array)
    return _describe_array(name, value)


def memory_leaf(name: str, value: Any) -> Leaf:  # noqa: ANN401
    """Return the leaf of an array or tensor, without a description of its kind.

    Not collective. For values that are restored in place.

    Args:
        name: Name of the leaf.
        value: An array or a tensor.

    Raises:
        StageError: On the calling rank, if it is more than plain bytes.
    """
    if _is_tensor(value):
        leaf: Leaf = _tensors().tensor_leaf(name, value)
        return leaf
    return array_leaf(name, value)


def refuse_attributes(values: Mapping[str, Any]) -> None:
    """Refuse tensors to which the program gave attributes: a new one would lack them.

    Not collective. For values that a restore may have to make.

    Args:
        values: Arrays and tensors by the names of their leaves.

    Raises:
        StageError: On the calling rank, with their names.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    plain = (torch.Tensor, torch.nn.Parameter)
    given = {n: vars(value) for n, value in values.items() if type(value) in plain}
    for name, attributes in given.items():
        # Private ones are notes of torch's own, such as those of its compiler; a Buffer is
        # a tensor with one more.
        own = {each for each in attributes if not each.startswith("_")}
        if "_is_buffer" in attributes:
            own.discard("persistent")
        if own:
            listed = ", ".join(map(repr, sorted(own)))
            raise StageError(
                f"{name or 'the value'} is a tensor that was given {listed}, which "
                "would not come back: save that separately, for example beside the tensor "
                "in a dict"
            )


def single_tile(leaf: Leaf) -> Leaf:
    """Return a leaf that other ranks may lack as a cut leaf: this rank has all of it.

    Not collective.

    Args:
        leaf: A leaf of an array or tensor; one that is cut already is returned as it is.
    """
    if leaf.tiles is not None:
        return leaf
    whole = Box.whole(leaf.spec.shape)
    return cut_leaf(leaf.spec, [Tile(whole, cast("TileBuffer", leaf.buffer))], leaf.gate)


def part_of(value: Any, place: Sequence[slice]) -> Any:  # noqa: ANN401
    """Return a box of an array or tensor, as a view of the same memory.

    Not collective.

    Args:
        value: An array or a tensor.
        place: The range of each dimension.
    """
    # With the ellipsis an array without dimensions gives a view too, not a copy.
    where = (*place, ...)
    if _is_tensor(value):
        with _tensors().ordinary():
            return value.detach()[where]
    return value[where]


def make_value(
    spec: LeafSpec,
    node: dict[str, Any],
    device: Any = None,  # noqa: ANN401 (a torch device)
    like: Any = None,  # noqa: ANN401 (a DTensor)
) -> tuple[Any, Leaf]:
    """Make an empty tensor or array from its node, and the leaf of it.

    Not collective.

    Args:
        spec: Of the leaf.
        node: Node of the leaf; empty if the structure does not mention it.
        device: Device for a tensor; None for the kind of device it was saved from, if this
            rank has one, else the host.
        like: DTensor over whose mesh a tensor is cut; None for a whole tensor.

    Raises:
        StateMismatchError: On the calling rank, if it cannot be made here.
    """
    kind = node.get(KIND)
    if kind not in ("tensor", "array", "scalar", "numbers", "bytes", "text"):
        raise StateMismatchError(f"{spec}: the saved structure does not mention it")
    try:
        layout = Layout.from_json(node, len(spec.shape))
    except (TypeError, ValueError) as error:
        raise StateMismatchError(f"{spec}: {error}") from None
    if kind == "tensor":
        return _make_tensor(spec, node, layout, device, like)
    array = empty_array(spec, layout)
    # Fill the base array: a subclass may interpret bytes in its own way.
    leaf = array_leaf(spec.name, array)
    if "records" in node:
        try:
            array = array.view(with_traits(array.dtype, node["records"]))
        except (TypeError, ValueError, AttributeError) as error:
            raise StateMismatchError(f"{spec}: {error}") from None
    if node.get("class") == "recarray":
        return array.view(np.recarray), leaf
    if node.get("class") == "matrix":
        return array.view(np.matrix), leaf
    if node.get("class") == "records":
        return array.view(np.dtype((np.record, array.dtype))), leaf
    return array, leaf


def takes_bytes(value: Any, memory: Container[int] = ()) -> bool:  # noqa: ANN401
    """Return whether saved bytes can be written into a live value in place.

    Not collective.

    Args:
        value: An array or a tensor.
        memory: Read-only addresses.
    """
    if type(value) is np.ndarray and value.flags.carray:
        return True
    if _is_tensor(value):
        value = _tensors().local_tensor(value)
        return not _repeats(value) and not (value.is_cpu and value.data_ptr() in memory)
    if not isinstance(value, np.ndarray) or not value.flags.writeable:
        return False
    return not overlaps_itself(value.shape, value.strides, value.itemsize)


def _describe_array(name: str, array: Any) -> tuple[dict[str, Any], Leaf]:  # noqa: ANN401
    node: dict[str, Any] = {KIND: "array"}
    if type(array) is not np.ndarray:
        if type(array) not in (np.matrix, np.recarray):
            raise StageError(
                f"{name or 'the value'} is a {_class_of(array)}, of which only the numbers "
                "would be saved: save np.asarray() of it, and the rest of its content "
                "separately"
            )
        node["class"] = type(array).__name__
    elif array.dtype.type is np.record:
        node["class"] = "records"
    _require_named(name, array.dtype)
    node |= _traits_node(array.dtype)
    swapped = not array.dtype.isnative and not array.dtype.names
    if swapped or not array.flags.c_contiguous:
        node |= layout_of(array.strides, swapped=swapped).to_json()
    if not array.flags.writeable:
        node["readonly"] = True
    return node, array_leaf(name, array)


def _require_named(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.names is None and dtype.metadata is None:
        return
    lost = unnamed_part(dtype)
    if lost is not None:
        raise StageError(
            f"{name or 'the value'}: its dtype {dtype} has {lost}, which would be lost: "
            "save a view without, or an ArrayState, whose arrays are restored in place"
        )


def _traits_node(dtype: np.dtype[Any]) -> dict[str, Any]:
    if dtype.names is None:
        return {}
    # The "class" of the node says whether the outermost one is a `numpy.record`.
    own, *inner = traits_of(dtype)
    traits = [own.removesuffix("record").strip(), *inner]
    return {"records": traits} if any(traits) else {}


def _describe_tensor(name: str, tensor: Any) -> tuple[dict[str, Any], Leaf]:  # noqa: ANN401
    torch = sys.modules["torch"]
    node: dict[str, Any] = {KIND: "tensor"}
    leaf = _tensors().tensor_leaf(name, tensor)
    if isinstance(tensor, torch.nn.Parameter):
        node["parameter"] = tensor.requires_grad
    elif type(tensor) is torch.Tensor or leaf.tiles is not None:
        if tensor.requires_grad and tensor.is_leaf:
            node["grad"] = True
    else:
        raise StageError(
            f"{name or 'the value'} is a {_class_of(tensor)}, of which only the numbers "
            "would come back: save them as a plain tensor"
        )
    if not tensor.is_contiguous():
        node |= layout_of(tensor.stride()).to_json()
    if not tensor.is_cpu:
        node["device"] = tensor.device.type
    return node, leaf


def _make_tensor(
    spec: LeafSpec,
    node: dict[str, Any],
    layout: Layout,
    device: Any,  # noqa: ANN401
    like: Any,  # noqa: ANN401
) -> tuple[Any, Leaf]:
    torch, tensors = sys.modules["torch"], _tensors()
    if device is None:
        device = tensors.device_here(node.get("device"))
    with tensors.ordinary():
        if like is None:
            tensor = tensors.empty_tensor(spec, device, layout)
        else:
            tensor = tensors.tensor_like(spec, like)
        leaf = tensors.tensor_leaf(spec.name, tensor)
        if "parameter" in node:
            return torch.nn.Parameter(tensor, requires_grad=bool(node["parameter"])), leaf
        return tensor.requires_grad_(bool(node.get("grad"))), leaf


def _repeats(tensor: Any) -> bool:  # noqa: ANN401
    if tensor.is_contiguous():
        return False
    width = tensor.element_size()
    return overlaps_itself(tensor.shape, [width * s for s in tensor.stride()], width)


@cache
def _tensors() -> ModuleType:
    # Import once: an import statement takes a microsecond for each of thousands of leaves.
    from mpi_ckpt.states import tensors

    return tensors


def _class_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _is_tensor(value: object) -> bool:
    # A tensor can only be here if torch was imported.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
