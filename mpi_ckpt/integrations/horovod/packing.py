# SPDX-License-Identifier: Apache-2.0
"""Splits a Python object into a small pickle and the memory of its arrays. No MPI.

The pickles come from a rank of the same job, over MPI. That rank already runs the same
program, so they are trusted. No file is ever read this way.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed object.

    Attributes:
        pickled: All but the memory of its arrays.
        buffers: That memory, live, in the order in which the pickle needs it.
    """

    pickled: bytes
    buffers: tuple[memoryview, ...]

    @property
    def lengths(self) -> list[int]:
        """Bytes of each buffer."""
        return [len(buffer) for buffer in self.buffers]

    def fits(self, pickled: bytes, lengths: Sequence[int]) -> bool:
        """Return whether these arrays can receive another rank's. Not collective."""
        return (
            self.pickled == pickled
            and self.lengths == list(lengths)
            and not any(buffer.readonly for buffer in self.buffers)
        )


def pack(value: Any) -> Packed:  # noqa: ANN401
    """Pack an object, without a copy of large arrays.

    Not collective. Arrays that are not contiguous, and tensors on a device, are copied
    into the pickle.

    Args:
        value: Anything that pickles.
    """
    stream = io.BytesIO()
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> None:
        buffers.append(buffer.raw())

    _pickler_class()(stream, protocol=5, buffer_callback=keep).dump(value)
    return Packed(stream.getvalue(), tuple(buffers))


def unpack(pickled: bytes, buffers: Sequence[memoryview]) -> Any:  # noqa: ANN401
    """Make an object over the given memory. Not collective."""
    # This comes from a rank of this job; see above.
    return pickle.loads(pickled, buffers=buffers)  # noqa: S301


def _pickler_class() -> type[Any]:
    """Return a pickler that keeps tensors' memory out of the pickle, as NumPy does.

    Based on cloudpickle if installed: Horovod's users broadcast functions too.
    """
    try:
        base: Any = importlib.import_module("cloudpickle").Pickler
    except ImportError:
        base = pickle.Pickler

    class Pickler(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
            super().__init__(*arguments, **options)
            self._memories: dict[int, _Storage] = {}

        def reducer_override(self, value: Any) -> Any:  # noqa: ANN401
            if _is_plain_tensor(value):
                return self._reduce_tensor(value)
            otherwise = getattr(super(), "reducer_override", None)
            return NotImplemented if otherwise is None else otherwise(value)

        def _reduce_tensor(self, tensor: Any) -> tuple[Any, ...]:  # noqa: ANN401
            # Tensors over the same memory arrive over the same memory.
            storage = tensor.untyped_storage()
            memory = self._memories.setdefault(storage.data_ptr(), _Storage(storage))
            form = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
            return _make_tensor, (memory, type(tensor), tensor.requires_grad, *form)

    return Pickler


def _is_plain_tensor(value: object) -> bool:
    # A tensor can only be here if torch was imported.
    torch: Any = sys.modules.get("torch")
    if torch is None or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    tensor: Any = value
    is_plain: bool = (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_leaf
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not (tensor.__dict__ or tensor._backward_hooks)  # noqa: SLF001
    )
    return is_plain


class _Storage:
    """The memory of one or more tensors; pickled once."""

    def __init__(self, storage: Any) -> None:  # noqa: ANN401
        self._storage = storage

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        torch = sys.modules["torch"]
        flat = torch.empty(0, dtype=torch.uint8).set_(self._storage)
        return _make_memory, (pickle.PickleBuffer(flat.numpy()),)


def _make_memory(buffer: Any) -> Any:  # noqa: ANN401
    import torch

    if len(buffer) == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _make_tensor(
    memory: Any,  # noqa: ANN401
    kind: Any,  # noqa: ANN401
    requires_grad: bool,
    dtype: Any,  # noqa: ANN401
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
) -> Any:  # noqa: ANN401
    import torch

    tensor = torch.empty(0, dtype=dtype)
    tensor.set_(memory.untyped_storage(), offset, shape, stride)
    if kind is torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)
