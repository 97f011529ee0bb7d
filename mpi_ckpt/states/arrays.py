# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays as leaves, and the state made of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt import dtypes
from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaf import Leaf, LeafSpec
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure, SyncMode
from mpi_ckpt.states.mismatch import compare_specs, raise_mismatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["ArrayBuffer", "ArrayState", "array_dtype_name", "empty_array"]

_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "complex128": "C128",
}
_DTYPES = {name: np.dtype(dtype) for dtype, name in _NAMES.items()}
# By dtype, not by its name: NumPy makes that anew each time it is asked, in 3 us.
_NATIVE = {dtype: name for name, dtype in _DTYPES.items()}
_LITTLE = _NATIVE if sys.byteorder == "little" else {}


def array_dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the leaf dtype of a NumPy dtype; byte order does not matter.

    Not collective. Thread-safe.

    Raises:
        StageError: On the calling rank, for objects and records, which are no bytes.
    """
    if dtype in _NATIVE:
        return _NATIVE[dtype]
    if dtype.name in _NAMES:
        return _NAMES[dtype.name]
    # Not newbyteorder(): NumPy's newer dtypes have none, and raise.
    name = f"numpy:{dtype.str.replace('>', '<')}"
    if dtype.hasobject or not dtypes.is_known(name):
        raise StageError(
            f"arrays of dtype {dtype} cannot be saved: only numbers, dates and "
            "fixed-width text are plain bytes"
        )
    return name


def empty_array(spec: LeafSpec) -> NDArray[Any]:
    """Make an array for a leaf.

    Not collective. Thread-safe.

    Raises:
        StateMismatchError: On the calling rank, if NumPy has no such dtype or shape, or
            there is no memory for it.
    """
    try:
        dtype = _DTYPES.get(spec.dtype) or np.dtype(spec.dtype.removeprefix("numpy:"))
    except TypeError:
        raise StateMismatchError(f"{spec}: NumPy has no such dtype here") from None
    try:
        return np.empty(spec.shape, dtype)
    except (ValueError, MemoryError) as error:
        raise StateMismatchError(f"{spec}: {error}") from None


class ArrayBuffer:
    """The bytes of an array of any layout, little end first. Not collective."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def view(self) -> memoryview | None:
        """Return the live bytes if they are contiguous, writable and little-endian."""
        direct = self._direct()
        return None if direct is None or direct.readonly else direct

    def read(self) -> memoryview:
        """Return the live bytes if possible, else those of a copy."""
        direct = self._direct()
        if direct is not None:
            return direct.toreadonly()
        contiguous = np.ascontiguousarray(self._array, dtype=self._little())
        return contiguous.reshape(-1).view(np.uint8).data.toreadonly()

    def copy_to(self, target: memoryview) -> None:
        """Copy the bytes in one go, whatever the layout."""
        if self._array.size:
            new = np.frombuffer(target, self._little()).reshape(self._array.shape)
            np.copyto(new, self._array)

    def write(self, data: memoryview) -> None:
        """Write bytes into the array, whatever its layout."""
        new = np.frombuffer(data, self._little()).reshape(self._array.shape)
        np.copyto(self._array, new)

    def stamp(self) -> int:
        """Return nothing of interest: an array notices no change."""
        return 0

    def _direct(self) -> memoryview | None:
        array = self._array
        if not array.flags.c_contiguous:
            return None
        if array.dtype in _LITTLE and array.size:
            # A third of the time of the general way, below.
            return array.data.cast("B")
        if array.dtype != self._little():
            return None
        return array.reshape(-1).view(np.uint8).data

    def _little(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self._array.dtype
        if dtype in _LITTLE:
            return dtype
        little: np.dtype[Any] = dtype.newbyteorder("<")
        return little


def array_leaf(name: str, array: NDArray[Any], known: LeafSpec | None = None) -> Leaf:
    """Make the leaf of an array.

    Not collective. Thread-safe.

    Args:
        name: Of the leaf.
        array: The array.
        known: The spec that a leaf of that name had; it is kept if it still holds.

    Raises:
        StageError: On the calling rank, if the array is more than plain bytes.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise StageError(f"{name or 'the value'} is a masked array: its mask would be lost")
    dtype, shape = array_dtype_name(array.dtype), array.shape
    if known is None or known.dtype != dtype or known.shape != shape:
        known = LeafSpec(name, dtype, shape)
    return Leaf(known, ArrayBuffer(array))


class ArrayState(LeafState):
    """Named NumPy arrays, restored in place.

    Args:
        name: As for `mpi_ckpt.State`.
        arrays: Any names, dtypes (but objects and records) and layouts. The same names,
            dtypes and shapes on every rank, and in every run.
        sync: As for `LeafState`.

    Attributes:
        arrays: The live arrays. Replace an entry freely between saves.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal.
    """

    def __init__(
        self, name: str, arrays: Mapping[str, NDArray[Any]], *, sync: SyncMode = "root"
    ) -> None:
        super().__init__(name, sync=sync)
        self.arrays: dict[str, NDArray[Any]] = dict(arrays)

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        given: dict[str, Any] = self.arrays
        for key, value in given.items():
            if not isinstance(value, np.ndarray):
                # Arithmetic on 0-d arrays gives NumPy scalars: nothing to restore into.
                given[key] = np.array(value)
        known = {spec.name: spec for spec in self._form.specs}
        return Capture(
            None, [array_leaf(k, a, known.get(k)) for k, a in self.arrays.items()]
        )

    def prepare(
        self,
        structure: Structure,  # noqa: ARG002
        specs: Sequence[LeafSpec],
        *,
        strict: bool,
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        live = self._fitting(specs, common=not strict)
        saved = {spec.name for spec in specs}
        return Arrival(
            [live.get(spec.name) for spec in specs],
            adopt=_nothing_left,
            missing=tuple(name for name in live if name not in saved),
            unexpected=tuple(spec.name for spec in specs if spec.name not in live),
        )

    def _fitting(self, specs: Sequence[LeafSpec], *, common: bool) -> dict[str, Leaf]:
        live = {leaf.spec.name: leaf for leaf in self.capture().leaves}
        ours = [leaf.spec for leaf in live.values()]
        compare_specs(self.name, specs, ours, common=common)
        raise_mismatch(
            self.name,
            [f"{k} is read-only" for k, a in self.arrays.items() if not a.flags.writeable],
        )
        return live


def _nothing_left() -> None:
    """Adopt arrays: every byte is in its place already."""
