# SPDX-License-Identifier: Apache-2.0
"""Turns torch tensors into leaves. Imported only when a torch state is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, Tile
from mpi_ckpt.leaves.tiles import cut_leaf
from mpi_ckpt.states.buffers.array_bytes import Layout
from mpi_ckpt.states.buffers.device_bytes import buffer_of
from mpi_ckpt.states.buffers.tensor_bytes import is_ordinary, ordinary
from mpi_ckpt.states.dtensor import local_pieces, local_tensor, make_like
from mpi_ckpt.states.wrappers import is_dtensor, is_sharded

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_C_ORDER = Layout()

# Types that this release of torch lacks are left out.
_NAMES = {
    getattr(torch, attribute): name
    for attribute, name in {
        "bool": "BOOL",
        "uint8": "U8",
        "int8": "I8",
        "float8_e5m2": "F8_E5M2",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2fnuz": "F8_E5M2FNUZ",
        "float8_e4m3fnuz": "F8_E4M3FNUZ",
        "float8_e8m0fnu": "F8_E8M0",
        "float4_e2m1fn_x2": "F4_X2",
        "uint16": "U16",
        "int16": "I16",
        "float16": "F16",
        "bfloat16": "BF16",
        "uint32": "U32",
        "int32": "I32",
        "float32": "F32",
        "complex32": "C32",
        "uint64": "U64",
        "int64": "I64",
        "float64": "F64",
        "complex64": "C64",
        "complex128": "C128",
    }.items()
    if hasattr(torch, attribute)
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def tensor_spec(name: str, tensor: torch.Tensor) -> LeafSpec:
    """Describe a tensor.

    Not collective. Thread-safe.

    Raises:
        StageError: On the calling rank, for tensors that are not a plain array of bytes.
    """
    if type(tensor) not in _PLAIN:
        _refuse_foreign(name, tensor)
    dense = tensor.layout == torch.strided and not tensor.is_nested
    if tensor.is_quantized:
        raise StageError(
            f"tensor {name!r} of {tensor.dtype} cannot be saved: its bytes lack the scales"
            "; save its dequantize(), or its int_repr() and scales as plain tensors"
        )
    if not dense or tensor.is_meta:
        raise StageError(
            f"tensor {name!r} ({tensor.layout}, {tensor.dtype}, {tensor.device}) cannot be "
            "saved: only dense tensors with memory of their own can"
        )
    if tensor.dtype not in _NAMES:
        raise StageError(f"tensor {name!r} of {tensor.dtype} cannot be saved")
    return LeafSpec(name, _NAMES[tensor.dtype], tuple(tensor.shape))


def tensor_leaf(name: str, tensor: torch.Tensor) -> Leaf:
    """Make the leaf of a tensor; see `tensor_spec`. Not collective. Thread-safe.

    The leaf of a DTensor is cut: its tiles are views of the local tensor.
    """
    if type(tensor) not in _PLAIN and is_dtensor(tensor):
        with ordinary():
            return _cut_leaf(name, tensor)
    if is_ordinary():
        return Leaf(tensor_spec(name, tensor), buffer_of(tensor.detach()))
    with ordinary():
        return Leaf(tensor_spec(name, tensor), buffer_of(tensor.detach()))


def _cut_leaf(name: str, tensor: torch.Tensor) -> Leaf:
    pieces = local_pieces(name, tensor)
    local = local_tensor(tensor).detach()
    spec = LeafSpec(name, tensor_spec(name, local).dtype, tuple(tensor.shape))
    tiles = []
    for box, place in pieces:
        ranges = zip(place, box.shape, strict=True)
        # The ellipsis makes a view of a tensor without dimensions too.
        where = (*[slice(at, at + length) for at, length in ranges], ...)
        tiles.append(Tile(box, buffer_of(local[where], tensor)))
    return cut_leaf(spec, tiles)


def device_here(kind: str | None) -> torch.device:
    """Return this rank's device of a kind; the host if it has none.

    Not collective. Thread-safe.

    Args:
        kind: Such as ``"cuda"``; None for the host.
    """
    module = getattr(torch, kind, None) if isinstance(kind, str) else None
    is_there = module is not None and getattr(module, "is_available", lambda: False)()
    return torch.device(kind if is_there and kind else "cpu")


def empty_tensor(
    spec: LeafSpec, device: torch.device | str = "cpu", layout: Layout = _C_ORDER
) -> torch.Tensor:
    """Make a tensor for a leaf.

    Not collective. Thread-safe. Call it within `ordinary` for an ordinary tensor.

    Args:
        spec: Of the leaf.
        device: Device of the tensor.
        layout: How it lies in memory.

    Raises:
        StateMismatchError: On the calling rank, if this torch has no such dtype or shape,
            or there is no memory for it.
    """
    if spec.dtype not in _DTYPES:
        raise _unknown_dtype(spec)
    try:
        shape = [spec.shape[dim] for dim in layout.order] if layout.order else spec.shape
        lying = torch.empty(shape, dtype=_DTYPES[spec.dtype], device=device)
        return lying.permute(*np.argsort(layout.order)) if layout.order else lying
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise StateMismatchError(f"{spec}: {reason}") from None


def tensor_like(spec: LeafSpec, like: torch.Tensor) -> torch.Tensor:
    """Make a DTensor for a leaf, over the mesh of another; see `make_like`.

    Not collective. Call it within `ordinary`.

    Args:
        spec: Of the leaf.
        like: A DTensor.

    Raises:
        StateMismatchError: On the calling rank, if this torch has no such dtype.
    """
    if spec.dtype not in _DTYPES:
        raise _unknown_dtype(spec)
    made: torch.Tensor = make_like(spec, _DTYPES[spec.dtype], like)
    return made


def _unknown_dtype(spec: LeafSpec) -> StateMismatchError:
    return StateMismatchError(f"{spec}: torch {torch.__version__} has no such dtype")


def _refuse_foreign(name: str, tensor: torch.Tensor) -> None:
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if is_sharded(tensor):
        raise StageError(
            f"tensor {name!r} is a {type(tensor).__name__}, of which each rank has a part "
            "that is not known here: make it a DTensor, or save a whole tensor"
        )
    if is_lazy(tensor):
        raise StageError(
            f"tensor {name!r} is a {kind}, which has no shape yet: run the module once "
            "before the first save"
        )
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        raise StageError(
            f"tensor {name!r} is a {kind}, which has no memory of its own but tensors "
            "inside: save those"
        )
