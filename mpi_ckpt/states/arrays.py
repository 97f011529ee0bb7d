# SPDX-License-Identifier: Apache-2.0
"""Turns NumPy arrays into leaves, and defines the state of named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.errors import RegistrationError, StageError, StateMismatchError
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure, SyncMode
from mpi_ckpt.states.buffers.array_bytes import (
    ArrayBuffer,
    Layout,
    array_dtype,
    array_dtype_name,
    overlaps_itself,
)
from mpi_ckpt.states.mismatch import are_alike, compare_specs, raise_mismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

__all__ = [
    "ArrayBuffer",
    "ArrayState",
    "array_leaf",
    "empty_array",
]

_C_ORDER = Layout()
SHARDED: Structure = {"sharded": 1}
CONCATENATED: Structure = {"concatenated": 1}
"""The structures of arrays that are cut over the ranks; others of arrays have none."""

_IS_CARRAY = attrgetter("flags.carray")  # contiguous, aligned and writable
_DTYPE, _SHAPE, _NDIM = attrgetter("dtype"), attrgetter("shape"), attrgetter("ndim")
# The program may replace arrays at any time. The replaced ones stay in memory until the
# next look, so they must not be large; then their number hardly matters.
_KEPT_BYTES_MAX = 256 << 20
_SCALAR = (
    "a scalar in a dict that the function makes: a restore could put nothing back into it. "
    "Return an array that the program keeps, or take an ObjectState"
)
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
        self._known = _KnownArrays({}, ())
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
        if leaves is self._known.leaves:
            return self._known.capture
        return Capture(None, leaves)

    def prepare(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],
        *,
        strict: bool,
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        leaves, problems = self._look(to_fill=True)
        # Of an ObjectState, for which the program has an ArrayState now.
        others = tuple(_plain_values(structure))
        problems += [
            f"{place or 'a value'} is saved, and is no array: take an ObjectState"
            for place in (others if strict else ())
        ]
        raise_mismatch(self.name, problems)
        ours = [leaf.spec for leaf in leaves]
        if are_alike(specs, ours):
            return Arrival(leaves, adopt=_nothing_left, unexpected=others)
        live = {leaf.spec.name: leaf for leaf in leaves}
        compare_specs(self.name, specs, ours, common=not strict)
        saved = {spec.name for spec in specs}
        return Arrival(
            [live.get(spec.name) for spec in specs],
            adopt=_nothing_left,
            missing=tuple(name for name in live if name not in saved),
            unexpected=others + tuple(spec.name for spec in specs if spec.name not in live),
        )

    def _look(self, *, to_fill: bool = False) -> tuple[Sequence[Leaf], list[str]]:
        """Return the leaves of the live arrays, and why some of them cannot be restored.

        Arrays of a known form are asked whether they can only ``to_fill`` them: a save
        reads them all the same.
        """
        arrays: dict[str, Any] = self.arrays
        known = self._known.find(arrays) if self._asked is None else None
        if known is not None:
            is_plain = not to_fill or all(map(_IS_CARRAY, arrays.values()))
            found = () if is_plain else map(_not_restorable, arrays, arrays.values())
            return known, list(filter(None, found))
        specs = {spec.name: spec for spec in self._form.specs}
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
                    problem = None if self._asked is None else f"{key} is {_SCALAR}"
                if problem is not None:
                    problems.append(problem)
                    continue
            spec = specs.get(key)
            try:
                leaf = array_leaf(key, array, spec)
            except StageError as error:
                problems.append(str(error))
                continue
            leaves.append(leaf)
            if leaf.spec is not spec or to_fill:
                problem = _not_restorable(key, array)
                problems += [problem] if problem else []
        if self._asked is None and not problems:
            self._known = _KnownArrays(arrays, leaves)
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
    if array.flags.carray:
        return None
    if not array.flags.writeable:
        problem = f"{key} is read-only: nothing could be put back into it"
    elif overlaps_itself(array.shape, array.strides, array.itemsize):
        problem = (
            f"{key} overlaps itself in memory, as after np.broadcast_to(): bytes cannot be "
            "put back into it; give a copy"
        )
    return problem


def _plain_values(structure: Structure, place: str = "") -> Iterator[str]:
    """Yield the place of each value in a saved structure that no array holds."""
    if structure in (None, SHARDED, CONCATENATED) and not place:
        return
    if isinstance(structure, list):
        structure = dict(enumerate(structure))
    if not isinstance(structure, dict):
        yield place
    elif not {"~", "leaf"} <= set(structure):
        for key, item in structure.items():
            if key != "~":
                yield from _plain_values(item, f"{place}/{key}" if place else str(key))


def _nothing_left() -> None:
    """Adopt arrays: every byte is already in place."""


class _KnownArrays:
    """The leaves of arrays, valid as long as arrays, dtypes and shapes are the same.

    Not thread-safe. Thousands of arrays are compared by C code alone.

    Args:
        arrays: The arrays, by name.
        leaves: Their leaves, in the same order.
    """

    def __init__(self, arrays: Mapping[str, Any], leaves: Sequence[Leaf]) -> None:
        values = list(arrays.values())
        is_kept = sum(leaf.spec.nbytes for leaf in leaves) <= _KEPT_BYTES_MAX
        self._names = list(arrays) if is_kept else []
        self._arrays = values if is_kept else []
        self._dtypes = list(map(_DTYPE, self._arrays))
        self._shapes = _shapes_of(self._arrays)
        self.leaves = tuple(leaves) if is_kept else ()

    @cached_property
    def capture(self) -> Capture:
        """Their capture."""
        return Capture(None, self.leaves)

    def find(self, arrays: Mapping[str, Any]) -> Sequence[Leaf] | None:
        """Return the leaves of arrays; None if any of them has changed, or is not known.

        Only their values may have changed, and where a C-contiguous array
        has its strides: a leaf reads both at each use.

        Args:
            arrays: The arrays, by name.
        """
        values = list(arrays.values())
        is_known = (
            len(values) == len(self._arrays) > 0
            and all(map(is_, values, self._arrays))
            and list(arrays) == self._names
            and list(map(_DTYPE, values)) == self._dtypes
            and _shapes_of(values) == self._shapes
        )
        return self.leaves if is_known else None


def _shapes_of(arrays: Sequence[Any]) -> list[Any]:
    # Lengths, if there is one dimension: a tuple for each array takes twice as long.
    is_flat = set(map(_NDIM, arrays)) == {1}
    return list(map(len if is_flat else _SHAPE, arrays))
