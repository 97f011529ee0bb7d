# SPDX-License-Identifier: Apache-2.0
"""Turns NumPy arrays into leaves, and defines the state of named arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.errors import RegistrationError, StageError, StateMismatchError
from mpi_ckpt.leaf import Leaf, LeafSpec, Place
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure, SyncMode
from mpi_ckpt.states.array_dtypes import LITTLE, array_dtype, array_dtype_name, holes_of
from mpi_ckpt.states.memory_layout import Layout, overlaps_itself
from mpi_ckpt.states.mismatch import compare_specs, raise_mismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "ArrayBuffer",
    "ArrayState",
    "array_leaf",
    "empty_array",
]

_C_ORDER = Layout()
# Other subclasses hold more than numbers (a unit, a mask), and a restore would lose or mix
# that.
_TAKEN = (np.ndarray, np.memmap, np.matrix, np.recarray, np.ma.MaskedArray)


def empty_array(spec: LeafSpec, layout: Layout = _C_ORDER) -> NDArray[Any]:
    """Make an array for a leaf.

    Not collective. Thread-safe.

    Args:
        spec: Spec of the leaf.
        layout: Its layout in memory.

    Raises:
        StateMismatchError: On the calling rank, if NumPy has no such dtype or shape, or
            there is no memory for it.
    """
    try:
        dtype = array_dtype(spec.dtype)
    except TypeError as error:
        raise StateMismatchError(f"{spec}: NumPy has no such dtype here: {error}") from None
    if layout.swapped:
        dtype = dtype.newbyteorder()
    try:
        order = layout.order or range(len(spec.shape))
        lying = np.empty([spec.shape[dim] for dim in order], dtype)
        return lying.transpose(np.argsort(order)) if layout.order else lying
    except (ValueError, MemoryError) as error:
        raise StateMismatchError(f"{spec}: {error}") from None


class _Bytes:
    """The bytes of an array's elements: one more dimension, whatever the strides."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "data": array.__array_interface__["data"],
            "shape": (*array.shape, array.itemsize),
            "strides": (*array.strides, 1),
        }


class ArrayBuffer:
    """The bytes of an array of any layout, little end first. Not collective."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def view(self) -> memoryview | None:
        """Return the live bytes if they are contiguous, writable and little-endian."""
        direct = self._direct()
        return None if direct is None or direct.readonly else direct

    def read(self) -> memoryview:
        """Return the live bytes if possible, else a copy's."""
        direct = self._direct()
        if direct is not None:
            return direct.toreadonly()
        data = np.empty(self._array.nbytes, np.uint8).data
        self.copy_to(data)
        return data.toreadonly()

    def copy_to(self, target: memoryview) -> None:
        """Copy the bytes at once, for any layout."""
        if self._array.size:
            new = np.frombuffer(target, self._little()).reshape(self._array.shape)
            np.copyto(new, self._array)
            holes = holes_of(new.dtype)
            if holes is not None:
                np.frombuffer(target, np.uint8).reshape(-1, len(holes))[:, holes] = 0

    def write(self, data: memoryview) -> None:
        """Write bytes into the array, for any layout."""
        new = np.frombuffer(data, self._little()).reshape(self._array.shape)
        np.copyto(self._array, new)

    def part(self, index: tuple[slice, ...]) -> ArrayBuffer:
        """Return a box of the array, as `TileBuffer` says."""
        # An array without dimensions, indexed by nothing, would give a number.
        return ArrayBuffer(self._array[index] if index else self._array)

    def host_bytes(self) -> NDArray[np.uint8] | None:
        """Return the live bytes of each element, as `TileBuffer` says."""
        array = self._array
        if array.dtype != self._little() or not array.flags.writeable:
            return None
        return np.asarray(_Bytes(array))

    def stamp(self) -> int:
        """Return a constant: an array notices no change."""
        return 0

    def place(self) -> Place:
        """Return the array's place in memory."""
        array = self._array
        return Place(array.ctypes.data, array.itemsize, array.shape, array.strides)

    def span(self) -> tuple[int, int]:
        """Return the address of its first byte, and one past the last."""
        array = self._array
        if array.flags.c_contiguous and array.dtype in LITTLE and array.size:
            # NumPy's own way to the address takes three times as long.
            start = ctypes.addressof(ctypes.c_char.from_buffer(array.data))
            return start, start + array.nbytes
        return self.place().span

    def _direct(self) -> memoryview | None:
        array = self._array
        if not array.flags.c_contiguous:
            return None
        if array.dtype in LITTLE and array.size:
            # This takes a third of the time of the general way below.
            return array.data.cast("B")
        if array.dtype != self._little() or holes_of(array.dtype) is not None:
            return None
        return array.reshape(-1).view(np.uint8).data

    def _little(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self._array.dtype
        # Records are saved unchanged, and types that are not NumPy's own have only one
        # order.
        if dtype in LITTLE or dtype.names or (dtype.isnative and LITTLE):
            return dtype
        little: np.dtype[Any] = dtype.newbyteorder("<")
        return little


def array_leaf(name: str, array: NDArray[Any], known: LeafSpec | None = None) -> Leaf:
    """Make the leaf of an array.

    Not collective. Thread-safe.

    Args:
        name: Name of the leaf.
        array: The array.
        known: The previous spec of a leaf of that name, which is reused if still correct.

    Raises:
        StageError: On the calling rank, if the array is more than plain bytes.
    """
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise StageError(f"{name or 'the value'} is a masked array: its mask would be lost")
    try:
        dtype, shape = array_dtype_name(array.dtype), array.shape
    except StageError as error:
        raise StageError(f"{name or 'the value'}: {error}") from None
    if known is None or known.dtype != dtype or known.shape != shape:
        known = LeafSpec(name, dtype, shape)
    return Leaf(known, ArrayBuffer(array))


class ArrayState(LeafState):
    """Named NumPy arrays, restored in place.

    Args:
        name: As for `mpi_ckpt.State`.
        arrays: Arrays of any names, dtypes (except objects) and layouts. The same names,
            dtypes and shapes on every rank, and in every run. A function that returns them
            is called at each save and restore: for a program that swaps two buffers, so
            that their names change arrays.
        sync: As for `LeafState`. By default replicas are compared and a difference is an
            error, since a simulation's arrays may be parts of a field: one rank's part
            would overwrite the others'.

    Attributes:
        arrays: The live arrays. Replace an entry freely between saves.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal, or
            an entry is no array.
    """

    def __init__(
        self,
        name: str,
        arrays: Mapping[str, NDArray[Any]] | Callable[[], Mapping[str, NDArray[Any]]],
        *,
        sync: SyncMode = "check",
    ) -> None:
        super().__init__(name, sync=sync)
        given: object = arrays
        if not isinstance(given, Mapping) and not callable(given):
            raise RegistrationError(
                f"state {name!r}: arrays is of type {type(given).__name__}: give a dict of "
                "arrays by name, {'x': array}, or a function that returns one"
            )
        self._asked = arrays if callable(arrays) else None
        self._kept: dict[str, Any] = {} if callable(arrays) else dict(arrays)
        problems = [_no_array(key, value) for key, value in self._kept.items()]
        if any(problems):
            raise RegistrationError(f"state {name!r}: {'; '.join(filter(None, problems))}")

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The live arrays; a given function is called each time."""
        return self._kept if self._asked is None else dict(self._asked())

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        leaves, problems = self._look()
        if problems:
            raise StageError(
                f"state {self.name!r} cannot be saved:\n    " + "\n    ".join(problems),
                problems=problems,
            )
        return Capture(None, leaves)

    def prepare(
        self,
        structure: Structure,  # noqa: ARG002
        specs: Sequence[LeafSpec],
        *,
        strict: bool,
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        leaves, problems = self._look()
        raise_mismatch(self.name, problems)
        live = {leaf.spec.name: leaf for leaf in leaves}
        ours = [leaf.spec for leaf in leaves]
        compare_specs(self.name, specs, ours, common=not strict)
        saved = {spec.name for spec in specs}
        return Arrival(
            [live.get(spec.name) for spec in specs],
            adopt=_nothing_left,
            missing=tuple(name for name in live if name not in saved),
            unexpected=tuple(spec.name for spec in specs if spec.name not in live),
        )

    def _look(self) -> tuple[list[Leaf], list[str]]:
        """Return the leaves of the live arrays, and why some of them cannot be restored."""
        known = {spec.name: spec for spec in self._form.specs}
        arrays: dict[str, Any] = self.arrays
        problems: list[str] = []
        leaves: list[Leaf] = []
        for key, value in arrays.items():
            array = value
            if type(value) is not np.ndarray:
                problem = _no_array(key, value)
                if problem is None and not isinstance(value, np.ndarray):
                    # Arithmetic on 0-d arrays gives scalars, which cannot be restored in
                    # place.
                    array = self._kept[key] = np.array(value)
                    problem = f"{key} is a scalar" if self._asked is not None else None
                if problem is not None:
                    problems.append(problem)
                    continue
            spec = known.get(key)
            try:
                leaf = array_leaf(key, array, spec)
            except StageError as error:
                problems.append(str(error))
                continue
            leaves.append(leaf)
            if leaf.spec is not spec:
                problem = _not_restorable(key, array)
                problems += [problem] if problem else []
        return leaves, problems


def _no_array(key: str, value: object) -> str | None:
    """Return the problem of an entry that is neither an array nor a number."""
    if type(value) in _TAKEN or isinstance(value, (np.generic, int, float, complex)):
        return None
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray):
        return (
            f"{key} is a {kind}, of which only the numbers would be saved: give "
            "np.asarray() of it"
        )
    return (
        f"{key} is a {kind}, not an array: converting it makes a copy, which does not "
        "follow its changes. Give np.asarray() of it if that shares its memory, else take "
        "an ObjectState"
    )


def _not_restorable(key: str, array: NDArray[Any]) -> str | None:
    problem = None
    if not array.flags.writeable:
        problem = f"{key} is read-only: nothing could be put back into it"
    elif overlaps_itself(array.shape, array.strides, array.itemsize):
        problem = (
            f"{key} overlaps itself in memory, as after np.broadcast_to(): bytes cannot be "
            "put back into it; give a copy"
        )
    return problem


def _nothing_left() -> None:
    """Adopt arrays: every byte is already in place."""
