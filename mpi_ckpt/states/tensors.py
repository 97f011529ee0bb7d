# SPDX-License-Identifier: Apache-2.0
"""Torch tensors as leaves. Imported only when a torch state is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaf import Leaf, LeafSpec, copy_bytes
from mpi_ckpt.states.wrappers import is_sharded

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TensorBuffer", "empty_tensor", "tensor_leaf", "tensor_spec"]

# Types that only newer releases of torch have are left out where they are missing.
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
_NOTHING: NDArray[np.uint8] = np.empty(0, np.uint8)


def tensor_spec(name: str, tensor: torch.Tensor) -> LeafSpec:
    """Describe a tensor.

    Not collective. Thread-safe.

    Raises:
        StageError: On the calling rank, for tensors that are no plain array of bytes.
    """
    if is_sharded(tensor):
        raise StageError(
            f"tensor {name!r} is a {type(tensor).__name__}, of which each rank has a part; "
            "mpi_ckpt saves replicas. Use torch.distributed.checkpoint for it, or save "
            "its full_tensor()"
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise StageError(
            f"tensor {name!r} ({tensor.layout}, {tensor.dtype}, {tensor.device}) cannot be "
            "saved: only dense tensors with memory of their own can"
        )
    if tensor.dtype not in _NAMES:
        raise StageError(f"tensor {name!r} of {tensor.dtype} cannot be saved")
    return LeafSpec(name, _NAMES[tensor.dtype], tuple(tensor.shape))


def tensor_leaf(name: str, tensor: torch.Tensor) -> Leaf:
    """Make the leaf of a tensor; see `tensor_spec`. Not collective. Thread-safe."""
    return Leaf(tensor_spec(name, tensor), TensorBuffer(tensor.detach()))


def empty_tensor(spec: LeafSpec, device: torch.device | str = "cpu") -> torch.Tensor:
    """Make a tensor for a leaf.

    Not collective. Thread-safe.

    Raises:
        StateMismatchError: On the calling rank, if this torch has no such dtype or shape,
            or there is no memory for it.
    """
    if spec.dtype not in _DTYPES:
        raise StateMismatchError(f"{spec}: torch {torch.__version__} has no such dtype")
    try:
        return torch.empty(spec.shape, dtype=_DTYPES[spec.dtype], device=device)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise StateMismatchError(f"{spec}: {reason}") from None


class TensorBuffer:
    """The bytes of a tensor of any layout, on any device. Not collective."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def view(self) -> memoryview | None:
        """Return the live bytes if they are contiguous host memory."""
        tensor = self._tensor
        lazy = tensor.is_conj() or tensor.is_neg()
        if tensor.device.type != "cpu" or lazy or not tensor.is_contiguous():
            return None
        return _as_bytes(tensor).data

    def read(self) -> memoryview:
        """Return the live bytes if possible, else those of a copy."""
        tensor = self._tensor.resolve_conj().resolve_neg()
        return _as_bytes(tensor.to("cpu").contiguous()).data.toreadonly()

    def copy_to(self, target: memoryview) -> None:
        """Copy the bytes in one go, whatever the layout and device."""
        direct = self.view()
        if direct is not None:
            copy_bytes(direct, target)
        elif self._tensor.numel():
            new = torch.frombuffer(target, dtype=self._tensor.dtype)
            new.view(self._tensor.shape).copy_(self._tensor)

    def write(self, data: memoryview) -> None:
        """Write bytes into the tensor, whatever its layout and device."""
        tensor = self._tensor
        new = torch.empty(tensor.shape, dtype=tensor.dtype)
        _as_bytes(new).data[:] = data
        with torch.no_grad():
            tensor.copy_(new)

    def stamp(self) -> int:
        """Return torch's count of changes in place; those through ``.data`` escape it."""
        # Inference tensors count nothing.
        return 0 if self._tensor.is_inference() else self._tensor._version  # noqa: SLF001


def _as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    # Viewed as bytes first: NumPy knows neither bfloat16 nor float8.
    flat = tensor.reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else _NOTHING
