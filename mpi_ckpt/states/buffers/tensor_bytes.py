# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the bytes of torch tensors. Imported only when a torch state is used."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from mpi_ckpt.leaves.leaf import Place, copy_bytes
from mpi_ckpt.states.buffers.array_bytes import write_alike

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.leaves.buckets import Readable

_function_modes = torch._C._len_torch_function_stack  # noqa: SLF001 (as torch.overrides)
_dispatch_modes = torch._C._len_torch_dispatch_stack  # noqa: SLF001
_is_inference_mode = torch.is_inference_mode_enabled
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

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor."""
        return self._tensor

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
        of_owner = 0 if self._owner is None else _count_of(self._owner)
        return of_owner + _count_of(self._tensor)

    def place(self) -> Place:
        """Return the tensor's place in memory."""
        tensor = self._tensor
        width = tensor.element_size()
        strides = tuple(width * step for step in tensor.stride())
        where = tensor.data_ptr(), width, tuple(tensor.shape), strides
        return Place(*where, flipped=_flipped(tensor))

    def span(self) -> tuple[int, int]:
        """Return its first byte and one past the last."""
        tensor = self._tensor
        if tensor.is_contiguous():
            start: int = tensor.data_ptr()
            return start, start + tensor.nbytes
        return self.place().span


def _flipped(tensor: torch.Tensor) -> str:
    """Return which bits a lazily conjugated or negated view reads inverted, in hex."""
    if not (tensor.is_conj() or tensor.is_neg()):
        return ""
    bits = bytearray(tensor.element_size())
    part = len(bits) // (2 if tensor.is_complex() else 1)
    sign = part - 1 if sys.byteorder == "little" else 0
    for start in range(0, len(bits), part):
        is_imaginary = start > 0
        if tensor.is_neg() != (tensor.is_conj() and is_imaginary):
            bits[start + sign] = 0x80
    return bits.hex()


def _count_of(tensor: torch.Tensor) -> int:
    # Inference tensors have no count.
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 (no public name)


def _arrays_of(buffers: Sequence[TensorBuffer]) -> list[Any]:
    """Return contiguous tensors of the host as arrays; none if one is not as NumPy's."""
    try:
        tensors = [one._tensor for one in buffers if is_ordinary()]  # noqa: SLF001
        arrays = [tensor.numpy() for tensor in tensors]
    except (TypeError, RuntimeError):
        return []
    return arrays if all(map(attrgetter("flags.c_contiguous"), arrays)) else []


def _as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    if not is_ordinary():
        with ordinary():
            return _bytes_of(tensor)
    return _bytes_of(tensor)


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return flat_bytes(tensor).numpy() if tensor.numel() else _NOTHING


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor of some elements, on its device.

    Not collective. Thread-safe. Call it within `ordinary`.
    """
    # View as bytes first: NumPy knows neither bfloat16 nor float8.
    flat = tensor.reshape(-1)
    if flat.numel() == 1:  # a single element has any stride, and is contiguous
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8)


def is_ordinary() -> bool:
    """Return whether `ordinary` would change nothing but gradients. Not collective."""
    # Called for every leaf: entering `ordinary` each time would take as long as the rest.
    return not (_function_modes() or _dispatch_modes() or _is_inference_mode())
