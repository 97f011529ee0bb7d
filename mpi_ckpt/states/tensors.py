# SPDX-License-Identifier: Apache-2.0
"""Turns torch tensors into leaves. Imported only when a torch state is used."""

from __future__ import annotations

from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import (
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaf import Leaf, LeafSpec, Place, Tile, copy_bytes
from mpi_ckpt.states.array_bytes import write_alike
from mpi_ckpt.states.dtensor import local_pieces, local_tensor, make_like
from mpi_ckpt.states.memory_layout import Layout
from mpi_ckpt.states.wrappers import is_dtensor, is_sharded
from mpi_ckpt.tiles import cut_leaf

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.buckets import Readable

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_function_modes = torch._C._len_torch_function_stack  # noqa: SLF001 (as torch.overrides)
_dispatch_modes = torch._C._len_torch_dispatch_stack  # noqa: SLF001
_is_inference_mode = torch.is_inference_mode_enabled
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
_NOTHING: NDArray[np.uint8] = np.empty(0, np.uint8)


@contextmanager
def ordinary() -> Iterator[None]:
    """Make torch work by its defaults, whatever the program has switched on.

    Not collective. For this thread: no default device, no function or dispatch mode, no
    inference mode, no gradients. Tensors made in the block are ordinary ones.
    """
    with (
        torch._C.DisableTorchFunction(),  # noqa: SLF001 (as torch.overrides does)
        _disable_current_modes(),
        torch.inference_mode(mode=False),
        torch.no_grad(),
    ):
        yield


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
    if _is_ordinary():
        return Leaf(tensor_spec(name, tensor), TensorBuffer(tensor.detach()))
    with ordinary():
        return Leaf(tensor_spec(name, tensor), TensorBuffer(tensor.detach()))


def _cut_leaf(name: str, tensor: torch.Tensor) -> Leaf:
    pieces = local_pieces(name, tensor)
    local = local_tensor(tensor).detach()
    spec = LeafSpec(name, tensor_spec(name, local).dtype, tuple(tensor.shape))
    tiles = []
    for box, place in pieces:
        ranges = zip(place, box.shape, strict=True)
        # The ellipsis makes a view of a tensor without dimensions too.
        where = (*[slice(at, at + length) for at, length in ranges], ...)
        tiles.append(Tile(box, TensorBuffer(local[where], tensor)))
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


class TensorBuffer:
    """The bytes of a tensor of any layout, on any device.

    Not collective.

    Args:
        tensor: The tensor.
        owner: DTensor whose local part has it; None for an ordinary tensor.
    """

    def __init__(self, tensor: torch.Tensor, owner: torch.Tensor | None = None) -> None:
        self._tensor = tensor
        self._owner = owner

    def view(self) -> memoryview | None:
        """Return the live bytes if they are contiguous host memory."""
        return _as_bytes(self._tensor).data if self._is_direct() else None

    def read(self) -> memoryview:
        """Return the live bytes if possible, else a copy's."""
        if self._is_direct():
            return _as_bytes(self._tensor).data.toreadonly()
        with ordinary():
            tensor = self._tensor.resolve_conj().resolve_neg()
            return _as_bytes(tensor.to("cpu").contiguous()).data.toreadonly()

    @staticmethod
    def read_all(buffers: Sequence[TensorBuffer]) -> Sequence[Readable]:
        """Return the live bytes of each tensor if possible, else a copy's."""
        return _arrays_of(buffers) or [buffer.read() for buffer in buffers]

    @staticmethod
    def write_all(buffers: Sequence[TensorBuffer], data: memoryview) -> bool:
        """Write bytes into tensors of one dtype and shape; return False if they are not."""
        return write_alike(_arrays_of(buffers), data)

    def copy_to(self, target: memoryview) -> None:
        """Copy the bytes at once, for any layout and device."""
        direct = self.view()
        if direct is not None:
            copy_bytes(direct, target)
        elif self._tensor.numel():
            with ordinary():
                new = torch.frombuffer(target, dtype=self._tensor.dtype)
                new.view(self._tensor.shape).copy_(self._tensor)

    def write(self, data: memoryview) -> None:
        """Write bytes into the tensor, for any layout and device."""
        tensor = self._tensor
        with ordinary(), torch.inference_mode(tensor.is_inference()):
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            _as_bytes(new).data[:] = data
            tensor.copy_(new)

    def _is_direct(self) -> bool:
        tensor = self._tensor
        lazy = tensor.is_conj() or tensor.is_neg()
        return tensor.is_contiguous() and tensor.is_cpu and not lazy

    def part(self, index: tuple[slice, ...]) -> TensorBuffer:
        """Return a box of the tensor, as `TileBuffer` says."""
        with ordinary():
            return TensorBuffer(self._tensor[index], self._owner)

    def host_bytes(self) -> NDArray[np.uint8] | None:
        """Return the live bytes of each element, as `TileBuffer` says."""
        tensor = self._tensor
        if not tensor.is_cpu or tensor.is_conj() or tensor.is_neg():
            return None
        with ordinary():
            # NumPy knows neither bfloat16 nor float8, but bytes.
            return tensor.unsqueeze(-1).view(torch.uint8).numpy()

    def stamp(self) -> int:
        """Return torch's count of changes in place; it misses those through ``.data``."""
        # Operations on a DTensor are not counted by its local part.
        counted = (self._tensor,) if self._owner is None else (self._tensor, self._owner)
        # Inference tensors have no count.
        return sum(
            tensor._version  # noqa: SLF001 (torch has no public name for it)
            for tensor in counted
            if not tensor.is_inference()
        )

    def place(self) -> Place:
        """Return the tensor's place in memory."""
        tensor = self._tensor
        width = tensor.element_size()
        strides = tuple(width * step for step in tensor.stride())
        return Place(tensor.data_ptr(), width, tuple(tensor.shape), strides)

    def span(self) -> tuple[int, int]:
        """Return its first byte and one past the last."""
        tensor = self._tensor
        if tensor.is_contiguous():
            start: int = tensor.data_ptr()
            return start, start + tensor.nbytes
        return self.place().span


def _arrays_of(buffers: Sequence[TensorBuffer]) -> list[Any]:
    """Return contiguous tensors of the host as arrays; none if one is not as NumPy's."""
    try:
        tensors = [one._tensor for one in buffers if _is_ordinary()]  # noqa: SLF001
        arrays = [tensor.numpy() for tensor in tensors]
    except (TypeError, RuntimeError):
        return []
    return arrays if all(map(attrgetter("flags.c_contiguous"), arrays)) else []


def _unknown_dtype(spec: LeafSpec) -> StateMismatchError:
    return StateMismatchError(f"{spec}: torch {torch.__version__} has no such dtype")


def _as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    if not _is_ordinary():
        with ordinary():
            return _bytes_of(tensor)
    return _bytes_of(tensor)


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    # View as bytes first: NumPy knows neither bfloat16 nor float8.
    flat = tensor.reshape(-1)
    if flat.numel() == 1:  # a single element has any stride, and is contiguous
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8).numpy() if flat.numel() else _NOTHING


def _is_ordinary() -> bool:
    # Called for every leaf: entering `ordinary` each time would take as long as the rest.
    return not (_function_modes() or _dispatch_modes() or _is_inference_mode())


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
