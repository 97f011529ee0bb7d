# SPDX-License-Identifier: Apache-2.0
"""Describes the memory of arrays; reads and writes their bytes as those of leaves."""

from __future__ import annotations

import ctypes
import math
import sys
from bisect import bisect_right
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from itertools import repeat
from operator import attrgetter, setitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.errors import StageError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import Place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.leaves.buckets import Readable


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
_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")
_IS_CONTIGUOUS, _ARRAY = attrgetter("flags.c_contiguous"), attrgetter("_array")
# Types of JAX and TensorFlow, if the program has imported them.
_ML_NAMES = {
    "bfloat16": "BF16",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
_ML_TYPES = {name: attribute for attribute, name in _ML_NAMES.items()}
_LONG = np.dtype(np.longdouble).itemsize
_DTYPES = {name: np.dtype(dtype) for dtype, name in _NAMES.items()}
# Keyed by dtype, not by name: NumPy makes the name at each access, in 3 us.
_NATIVE = {dtype: name for name, dtype in _DTYPES.items()}
LITTLE = _NATIVE if sys.byteorder == "little" else {}
"""Element types whose bytes in memory are those of a leaf; none on other machines."""


def array_dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the leaf dtype of a NumPy dtype; byte order does not matter.

    Not collective. Thread-safe. Within records it does: they are saved unchanged.

    Raises:
        StageError: On the calling rank, for objects, which are not bytes.
    """
    if dtype in _NATIVE:
        return _NATIVE[dtype]
    if dtype.name in _NAMES:
        return _NAMES[dtype.name]
    if dtype.name in _ML_NAMES and dtype.type.__module__.startswith("ml_dtypes"):
        return _ML_NAMES[dtype.name]
    if dtype.names and not dtype.hasobject:
        name = dtypes.encode_record(_record_of(dtype))
    else:
        # Not newbyteorder(): NumPy's newer dtypes have no byte order, and raise.
        name = f"numpy:{dtype.str.replace('>', '<')}"
    is_foreign = dtype.kind == "V" and dtype.type not in (np.void, np.record)
    if dtype.hasobject or is_foreign or not dtypes.is_known(name):
        raise StageError(
            f"arrays of dtype {dtype} cannot be saved: only numbers, dates, fixed-width "
            "text and records of them are plain bytes"
        )
    return name


def array_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a leaf dtype, little end first.

    Not collective. Thread-safe.

    Raises:
        TypeError: On the calling rank, if NumPy has no such dtype here.
    """
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _ML_TYPES:
        try:
            found: np.dtype[Any] = np.dtype(
                getattr(import_module("ml_dtypes"), _ML_TYPES[name])
            )
        except (ImportError, AttributeError) as error:
            raise TypeError(f"the package ml_dtypes is needed: {error}") from None
        return found
    if name.startswith("numpy:{"):
        return _dtype_of(dtypes.parse_record(name), repeat(""))
    return np.dtype(name.removeprefix("numpy:"))


def unnamed_part(dtype: np.dtype[Any]) -> str | None:
    """Return the part of a dtype that its name lacks, so that a new one would lack it too.

    Not collective. Thread-safe. NumPy treats two dtypes that differ in it as equal.
    """
    if dtype.metadata:
        return f"metadata, {dict(dtype.metadata)}"
    for name in dtype.names or ():
        assert dtype.fields is not None
        inner, _, *title = dtype.fields[name]
        if title:
            return f"titles of fields, as {title[0]!r} of {name!r}"
        element, _ = inner.subdtype or (inner, ())
        found = unnamed_part(element)
        if found is not None:
            return f"{found} in {name!r}"
    return None


def traits_of(dtype: np.dtype[Any]) -> list[str]:
    """Return, of each record in a dtype, the traits that the dtype's name lacks.

    Not collective. Thread-safe. NumPy treats two dtypes that differ in them as equal.

    Returns:
        "aligned", "record" (its elements are `numpy.record`), "aligned record" or "", the
        outermost record first, each before those in its fields.
    """
    traits = {"aligned": dtype.isalignedstruct, "record": dtype.type is np.record}
    found = [" ".join(trait for trait, has_it in traits.items() if has_it)]
    for inner, *_ in (dtype.fields or {}).values():
        element = inner.base
        found += traits_of(element) if element.names else []
    return found


def with_traits(dtype: np.dtype[Any], traits: Sequence[str]) -> np.dtype[Any]:
    """Return a dtype whose records have the traits.

    Not collective. Thread-safe.

    Args:
        dtype: Dtype of a record.
        traits: As `traits_of` returns them.

    Raises:
        ValueError: On the calling rank, if the dtype cannot have them.
    """
    if len(traits) != len(traits_of(dtype)):
        raise ValueError(f"{len(traits)} traits of {len(traits_of(dtype))} records")
    return _dtype_of(_record_of(dtype), iter(traits))


@lru_cache(maxsize=256)
def holes_of(dtype: np.dtype[Any]) -> NDArray[np.bool_] | None:
    """Return which bytes of an element belong to no value; None if all do.

    Not collective. Thread-safe. These bytes hold whatever the memory held before: the same
    value would have different bytes on another rank.
    """
    holes = np.ones(dtype.itemsize, np.bool_)
    if dtype.fields is None:
        # Of the 16 bytes of a long double an x86 uses 10.
        is_long = dtype.char in "gG"
        used = 10 if is_long and np.finfo(np.longdouble).nmant == 63 else dtype.itemsize
        part = _LONG if used == 10 else dtype.itemsize
        skipped = 0 if dtype.isnative else part - used
        for start in range(skipped, dtype.itemsize, part):
            holes[start : start + used] = False
    for inner, offset, *_ in (dtype.fields or {}).values():
        element, shape = inner.subdtype or (inner, ())
        within = holes_of(element)
        if within is None:
            within = np.zeros(element.itemsize, np.bool_)
        holes[offset : offset + inner.itemsize] &= np.tile(within, math.prod(shape))
    return holes if holes.any() else None


def _record_of(dtype: np.dtype[Any]) -> dtypes.Record:
    fields = []
    for name in dtype.names or ():
        assert dtype.fields is not None
        inner, offset, *_ = dtype.fields[name]
        element, shape = inner.subdtype or (inner, ())
        kind = _record_of(element) if element.names else element.str
        fields.append(dtypes.RecordField(name, kind, tuple(shape), offset))
    return dtypes.Record(dtype.itemsize, tuple(fields))


def _dtype_of(record: dtypes.Record, traits: Iterator[str]) -> np.dtype[Any]:
    own = set(next(traits).split())
    if own - {"aligned", "record"}:
        raise ValueError(f"a record is made {' and '.join(sorted(own))}")
    kinds = [
        _dtype_of(field.type, traits)
        if isinstance(field.type, dtypes.Record)
        else np.dtype(field.type)
        for field in record.fields
    ]
    layout: Any = {
        "names": [field.name for field in record.fields],
        "formats": [
            (kind, field.shape) if field.shape else kind
            for kind, field in zip(kinds, record.fields, strict=True)
        ],
        "offsets": [field.offset for field in record.fields],
        "itemsize": record.nbytes,
        "aligned": "aligned" in own,
    }
    made: np.dtype[Any] = np.dtype(layout)
    return np.dtype((np.record, made)) if "record" in own else made


def write_alike(arrays: Sequence[NDArray[Any]], data: memoryview) -> bool:
    """Write bytes into arrays, if all are of one dtype and shape; return whether they are.

    Not collective. Arrays without dimensions are left out: NumPy makes numbers of rows that
    are one element, and may change a NaN on the way.

    Args:
        arrays: Arrays of any layout.
        data: Bytes for all of them, one after the other.
    """
    many: list[Any] = list(arrays)
    if not many:
        return False
    dtype, shape = many[0].dtype, many[0].shape
    alike = set(map(_SHAPE, many)) == {shape} and set(map(_DTYPE, many)) == {dtype}
    if not (alike and shape and dtype in LITTLE):
        return False
    rows = np.frombuffer(data, dtype).reshape(len(many), *shape)
    try:
        deque(map(setitem, many, repeat(...), rows), maxlen=0)
    except ValueError:  # one is read-only: written one by one, it is raised with the name
        return False
    return True


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

    @staticmethod
    def read_all(buffers: Sequence[ArrayBuffer]) -> Sequence[Readable]:
        """Return the live bytes of each array if possible, else a copy's."""
        arrays: list[Any] = list(map(_ARRAY, buffers))
        if (
            all(map(_IS_CONTIGUOUS, arrays))
            and set(map(attrgetter("dtype"), arrays)) <= LITTLE.keys()
        ):
            return arrays
        return [buffer.read() for buffer in buffers]

    @staticmethod
    def write_all(buffers: Sequence[ArrayBuffer], data: memoryview) -> bool:
        """Write bytes into arrays of one dtype and shape; return False if they are not."""
        return write_alike([buffer._array for buffer in buffers], data)  # noqa: SLF001

    @staticmethod
    def span_all(buffers: Sequence[ArrayBuffer]) -> NDArray[np.uint64] | None:
        """Return the spans of arrays; None if one of them is empty or not contiguous."""
        arrays: list[Any] = [buffer._array for buffer in buffers]  # noqa: SLF001 (its own)
        try:
            starts = list(map(ctypes.addressof, map(ctypes.c_char.from_buffer, arrays)))
        except (TypeError, ValueError, BufferError):
            return None
        sizes = np.array(list(map(attrgetter("nbytes"), arrays)), np.uint64)
        first = np.array(starts, np.uint64)
        return np.stack([first, first + sizes], axis=1)

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
        swapped = 0
        if array.dtype != self._little():
            swapped = _number_bytes(array.dtype)
        where = array.ctypes.data, array.itemsize, array.shape, array.strides
        return Place(*where, swapped)

    def span(self) -> tuple[int, int]:
        """Return the address of its first byte, and one past the last."""
        array = self._array
        flags = array.flags
        if flags.c_contiguous and flags.writeable and array.dtype in LITTLE and array.size:
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


def _number_bytes(dtype: np.dtype[Any]) -> int:
    """Return the bytes of what a byte order is about: a number, half a complex one."""
    parts = {"c": 2, "U": dtype.itemsize // 4}.get(dtype.kind, 1)
    return dtype.itemsize // max(parts, 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """The memory layout that a new value needs to match the saved one.

    Attributes:
        order: The dimensions, the one of the longest strides first; empty if that is the
            order of the shape (C order).
        swapped: Whether the bytes of an element are in the opposite order of this
            machine's.
    """

    order: tuple[int, ...] = ()
    swapped: bool = False

    @classmethod
    def from_json(cls, node: dict[str, Any], dims: int) -> Layout:
        """Read a layout from the node of a leaf; see `to_json`. Not collective.

        Raises:
            ValueError: On the calling rank, if it is no layout of so many dimensions.
        """
        order = tuple(node.get("order", ()))
        if order and sorted(order) != list(range(dims)):
            raise ValueError(f"{order} is no order of {dims} dimensions")
        return cls(order, bool(node.get("swapped", False)))

    def to_json(self) -> dict[str, Any]:
        """Return its parts that are not the default, as JSON values. Not collective."""
        node: dict[str, Any] = {}
        if self.order:
            node["order"] = list(self.order)
        if self.swapped:
            node["swapped"] = True
        return node


def layout_of(strides: Sequence[int], *, swapped: bool = False) -> Layout:
    """Return the layout of a value that is not in C order.

    Not collective. Thread-safe. Gaps and repeated elements are not part of it: a new value
    has none.

    Args:
        strides: Stride of each dimension, in any unit.
        swapped: See `Layout`.
    """
    order = tuple(sorted(range(len(strides)), key=lambda dim: -abs(strides[dim])))
    return Layout(() if order == tuple(range(len(strides))) else order, swapped)


def overlaps_itself(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Return whether two elements share memory, as after ``expand`` or ``as_strided``.

    Not collective. Thread-safe.

    Args:
        shape: Shape in elements.
        strides: Strides in bytes.
        itemsize: Bytes of an element.
    """
    if 0 in shape:
        return False
    dims = sorted((abs(step), n) for n, step in zip(shape, strides, strict=True) if n > 1)
    end = itemsize
    for step, n in dims:
        if step < end:
            break
        end += step * (n - 1)
    else:
        return False
    if dims[0][0] == 0:
        return True
    # The elements interleave, so every byte is checked by writing to an image of the
    # memory.
    span = sum(step * (n - 1) for step, n in dims) + itemsize
    image = np.zeros(span, np.uint8)
    steps, counts = zip(*dims, strict=True)
    bytes_of = np.lib.stride_tricks.as_strided(image, (*counts, itemsize), (*steps, 1))
    bytes_of[...] = 1
    return int(image.sum()) < bytes_of.size


class ReadonlyMemory:
    """The read-only memory of this process, read when first needed.

    Not collective. Empty if the kernel does not tell. Reading it takes a millisecond.
    """

    @cached_property
    def _spans(self) -> tuple[list[int], list[int]]:
        starts: list[int] = []
        ends: list[int] = []
        with suppress(OSError):
            for line in Path("/proc/self/maps").read_text().splitlines():
                span, permissions = line.split(maxsplit=2)[:2]
                if permissions.startswith("r-"):
                    start, end = span.split("-")
                    starts.append(int(start, 16))
                    ends.append(int(end, 16))
        return starts, ends

    def __contains__(self, address: object) -> bool:
        assert isinstance(address, int)
        starts, ends = self._spans
        place = bisect_right(starts, address) - 1
        return place >= 0 and address < ends[place]
