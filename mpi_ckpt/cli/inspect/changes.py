# SPDX-License-Identifier: Apache-2.0
"""Compares two generations: by digest first, by value where digests differ.

Of leaves that are cut alike, or not cut, only blocks whose digests differ are read, one of
each side at a time. Digests of other tiles cannot be compared: those leaves are read, a
part of each side at a time. So memory stays at a few blocks for leaves of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.leaves import dtypes
from mpi_ckpt.storage.reading.assembly import read_box, slabs, state_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from mpi_ckpt.decomposition.boxes import Box
    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.storage.reading.assembly import StoredArray
    from mpi_ckpt.storage.reading.reader import GenerationReader

    Array = NDArray[Any]


# Widened copies of so many elements are small compared with their block.
_ELEMENTS = 1 << 18

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_COMPLEX = {"C128": "<c16", "C64": "<c8"}
_INTEGERS = {
    "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "BOOL": "u1",
}  # fmt: skip
# Exponent bits, fraction bits, bias, and meaning of the largest exponent: "ieee" has
# infinities, "fn" one NaN, "fnuz" one NaN in the place of minus zero.
_EIGHT_BITS = {
    "F8_E4M3": (4, 3, 7, "fn"),
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3FNUZ": (4, 3, 8, "fnuz"),
    "F8_E5M2FNUZ": (5, 2, 16, "fnuz"),
}
_KNOWN = frozenset({*_FLOATS, *_COMPLEX, *_INTEGERS, *_EIGHT_BITS, "BF16", "F8_E8M0"})


def is_numeric(dtype: str) -> bool:
    """Return whether `Difference` can compare elements of a dtype."""
    return dtype in _KNOWN


@dataclass(slots=True)
class Difference:
    """Adds up the differences between two leaves.

    Attributes:
        dtype: The dtype of both, for which `is_numeric` holds.
        differing: Elements whose bits differ.
        max_abs: Largest absolute difference of two finite elements.
        max_rel: Largest difference relative to the larger of the two.
        not_finite: Differing elements that are NaN or infinite on one side or both.
    """

    dtype: str
    differing: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    not_finite: int = 0

    def add(self, left: memoryview, right: memoryview) -> None:
        """Compare two runs of bytes of the same whole number of elements."""
        step = _ELEMENTS * dtypes.element_bytes(self.dtype)
        for start in range(0, len(left), step):
            self._add(left[start : start + step], right[start : start + step])

    def _add(self, left: memoryview, right: memoryview) -> None:
        for a, b in self._differing(left, right):
            if self.dtype in _INTEGERS:
                distance = _subtract_exactly(a, b)
                size = np.maximum(np.abs(a.astype(np.float64)), np.abs(b.astype(float)))
            else:
                with np.errstate(all="ignore"):
                    distance = np.abs(a - b)
                    size = np.maximum(np.abs(a), np.abs(b))
                # The difference of two finite numbers may exceed the largest number.
                finite = np.isfinite(a) & np.isfinite(b)
                self.not_finite += int(np.count_nonzero(~finite))
                distance, size = distance[finite], size[finite]
                distance = np.nan_to_num(distance, posinf=np.finfo(np.float64).max)
            if len(distance):
                self.max_abs = max(self.max_abs, float(distance.max()))
                # Zero and minus zero differ only in their bits.
                relative = np.divide(
                    distance, size, out=np.zeros(len(distance)), where=size > 0
                )
                self.max_rel = max(self.max_rel, float(relative.max()))

    def _differing(
        self, left: memoryview, right: memoryview
    ) -> Iterator[tuple[Array, Array]]:
        width = dtypes.element_bytes(self.dtype)
        a = np.frombuffer(left, np.uint8).reshape(-1, width)
        b = np.frombuffer(right, np.uint8).reshape(-1, width)
        unequal = (a != b).any(axis=1)
        count = int(np.count_nonzero(unequal))
        if count:
            self.differing += count
            with np.errstate(invalid="ignore"):  # a signalling NaN is like any other
                pair = _values(self.dtype, a[unequal]), _values(self.dtype, b[unequal])
            yield pair


def _values(dtype: str, rows: Array) -> Array:
    """Return rows of bytes as numbers: integers unchanged, others widened."""
    flat: Array = np.ascontiguousarray(rows).reshape(-1)
    if dtype in _INTEGERS:
        integers: Array = flat.view(_INTEGERS[dtype])
        return integers
    if dtype in _COMPLEX:
        pairs: Array = flat.view(_COMPLEX[dtype])
        return pairs.astype(np.complex128)
    if dtype == "BF16":
        wide: Array = flat.view("<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).astype(np.float64)
    if dtype == "F8_E8M0":
        exponents = flat.astype(np.float64)
        return np.where(flat == 255, np.nan, np.exp2(exponents - 127))
    if dtype in _EIGHT_BITS:
        return _eight_bit_table(dtype)[flat]
    floats: Array = flat.view(_FLOATS[dtype])
    return floats.astype(np.float64)


def _subtract_exactly(a: Array, b: Array) -> Array:
    # In the unsigned type of the same width, the larger minus the smaller never overflows.
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    upper, lower = np.maximum(a, b).view(unsigned), np.minimum(a, b).view(unsigned)
    distance: Array = upper - lower
    return distance.astype(np.float64)


def _eight_bit_table(dtype: str) -> Array:
    exponent_bits, fraction_bits, bias, special = _EIGHT_BITS[dtype]
    codes = np.arange(256)
    sign = np.where(codes >= 128, -1.0, 1.0)
    exponent = (codes >> fraction_bits) & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
    normal = np.exp2(exponent - float(bias)) * (1 + fraction)
    table: Array = sign * np.where(exponent > 0, normal, np.exp2(1.0 - bias) * fraction)
    if special == "fnuz":
        table[128] = np.nan
    elif special == "fn":
        table[[127, 255]] = np.nan
    else:
        largest = exponent == (1 << exponent_bits) - 1
        table[largest] = np.where(fraction == 0, sign * np.inf, np.nan)[largest]
    return table


STREAM = "(stream)"
_CHANGES_MAX = 1000
_PART_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class LeafChange:
    """One leaf of either generation, or the stream of a plain state.

    Attributes:
        state: Name of the state.
        leaf: Name of the leaf, or ``STREAM``.
        change: ``equal``, ``changed``, ``added`` or ``removed``.
        left: Its form in the first generation; None if it is not in there.
        right: The same in the second.
        left_bytes: Its bytes in the first.
        right_bytes: Its bytes in the second.
        difference: How far apart the values are, if known.
    """

    state: str
    leaf: str
    change: str
    left: LeafSpec | None = None
    right: LeafSpec | None = None
    left_bytes: int = 0
    right_bytes: int = 0
    difference: Difference | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the change as JSON values."""
        document: dict[str, Any] = {
            "state": self.state,
            "leaf": self.leaf,
            "change": self.change,
        }
        for side, spec, nbytes in (
            ("left", self.left, self.left_bytes),
            ("right", self.right, self.right_bytes),
        ):
            if spec is not None:
                shape = list(spec.shape)
                document[side] = {"dtype": spec.dtype, "shape": shape, "bytes": nbytes}
        if self.difference is not None:
            document |= {
                "elements_differing": self.difference.differing,
                "max_abs": self.difference.max_abs,
                "max_rel": self.difference.max_rel,
                "not_finite": self.difference.not_finite,
            }
        return document


@dataclass(frozen=True, slots=True)
class _Entry:
    """A leaf or a stream of one side.

    Attributes:
        reader: The open generation.
        spec: Form of the leaf; None for a stream.
        array: Where its bytes are.
    """

    reader: GenerationReader
    spec: LeafSpec | None
    array: StoredArray

    @property
    def nbytes(self) -> int:
        return self.array.spec.nbytes

    @property
    def digests(self) -> dict[Box, tuple[bytes, ...]]:
        """The digests of the blocks of each tile."""
        return {tile.box: tile.leaf.digest.blocks for tile in self.array.tiles}


def compare_generations(
    left: GenerationReader, right: GenerationReader, done: Callable[[int], None]
) -> list[LeafChange]:
    """Compare all leaves and streams of two open generations.

    Args:
        left: The first.
        right: The second.
        done: Called with the bytes of each leaf of the first when it is done.

    Raises:
        CorruptGenerationError: If bytes that must be read are not those saved.
        ReadError: If they cannot be read.
    """
    ours, theirs = _entries(left), _entries(right)
    changes = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        mine, other = ours.get(key), theirs.get(key)
        if mine is None or other is None:
            changes.append(_one_sided(key, mine, other))
        else:
            changes.append(_compare(key, mine, other))
        if mine is not None:
            done(mine.nbytes)
    return changes


def structure_changes(left: Any, right: Any) -> list[tuple[str, Any, Any]]:  # noqa: ANN401 (JSON)
    """Return path and both values for every difference between JSON values.

    An entry on one side only has None on the other.
    """
    changes: list[tuple[str, Any, Any]] = []
    stack = [("", left, right)]
    while stack and len(changes) < _CHANGES_MAX:
        path, a, b = stack.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            keys: list[Any] = sorted({*a, *b}, reverse=True)
        elif isinstance(a, list) and isinstance(b, list):
            keys = list(reversed(range(max(len(a), len(b)))))
        else:
            if type(a) is not type(b) or a != b:
                changes.append((path, a, b))
            continue
        stack += [(f"{path}/{k}" if path else f"{k}", _at(a, k), _at(b, k)) for k in keys]
    return changes


def _at(value: Any, key: Any) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, dict):
        return value.get(key)
    return value[key] if key < len(value) else None


def _entries(reader: GenerationReader) -> dict[tuple[str, str], _Entry]:
    entries: dict[tuple[str, str], _Entry] = {}
    for state in reader.manifest.states:
        for array in state_arrays(reader, state):
            name = STREAM if state.is_stream else array.spec.name
            spec = None if state.is_stream else array.spec
            entries[state.name, name] = _Entry(reader, spec, array)
    return entries


def _one_sided(
    key: tuple[str, str], mine: _Entry | None, other: _Entry | None
) -> LeafChange:
    return LeafChange(
        *key,
        change="added" if mine is None else "removed",
        left=mine.spec if mine else None,
        right=other.spec if other else None,
        left_bytes=mine.nbytes if mine else 0,
        right_bytes=other.nbytes if other else 0,
    )


def _compare(key: tuple[str, str], left: _Entry, right: _Entry) -> LeafChange:
    equal, difference = False, None
    if left.spec == right.spec and left.nbytes == right.nbytes:
        equal, difference = _compare_bytes(left, right)
    return LeafChange(
        *key,
        change="equal" if equal else "changed",
        left=left.spec,
        right=right.spec,
        left_bytes=left.nbytes,
        right_bytes=right.nbytes,
        difference=difference,
    )


def _compare_bytes(left: _Entry, right: _Entry) -> tuple[bool, Difference | None]:
    """Return whether leaves of one form are equal, and how far apart they are if known."""
    mine, other = left.digests, right.digests
    block_bytes = left.reader.manifest.block_bytes
    is_alike = mine.keys() == other.keys()
    is_alike = is_alike and block_bytes == right.reader.manifest.block_bytes
    if is_alike and mine == other:
        return True, None
    dtype = left.array.spec.dtype
    is_measured = left.spec is not None and is_numeric(dtype)
    difference = Difference(dtype) if is_measured else None
    if is_alike and difference is None:
        return False, None
    if is_alike and block_bytes % dtypes.element_bytes(dtype) == 0:
        pairs = _differing_blocks(left, right)
    else:
        pairs = _differing_parts(left, right)
    differs = False
    for ours, theirs in pairs:
        differs = True
        if difference is None:
            break
        difference.add(ours, theirs)
    return not differs, difference if differs else None


def _differing_blocks(
    left: _Entry, right: _Entry
) -> Iterator[tuple[memoryview, memoryview]]:
    """Give the bytes of both sides of the blocks whose digests differ."""
    others = {tile.box: tile.leaf for tile in right.array.tiles}
    for tile in left.array.tiles:
        mine, other = tile.leaf, others[tile.box]
        digests = zip(mine.digest.blocks, other.digest.blocks, strict=True)
        for block, (ours, theirs) in enumerate(digests):
            if ours != theirs:
                yield (
                    left.reader.read_block(mine, block),
                    right.reader.read_block(other, block),
                )


def _differing_parts(
    left: _Entry, right: _Entry
) -> Iterator[tuple[memoryview, memoryview]]:
    """Give the bytes of both sides of the parts of the leaf that differ."""
    spec = left.array.spec
    width = dtypes.element_bytes(spec.dtype)
    for box in slabs(spec.shape, max(1, _PART_BYTES // width)):
        parts = []
        for side in (left, right):
            parts.append(memoryview(bytearray(box.size * width)))
            read_box(side.reader, side.array, box, parts[-1])
        if parts[0] != parts[1]:
            yield parts[0], parts[1]
