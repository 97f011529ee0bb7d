# SPDX-License-Identifier: Apache-2.0
"""Reads any box of a leaf, whole or cut, and proves each block that it reads.

Memory is bounded by the box and one block. A block is a run of the bytes of a tile, and may
begin and end within an element: boxes are therefore those of bytes, with one more dimension
for the bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.decomposition.boxes import Box, boxes_of_run, intersection
from mpi_ckpt.errors import ReadError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.storage.format.manifest import CutLeaf, StoredTile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.storage.format.manifest import StoredLeaf, StoredState
    from mpi_ckpt.storage.reading.reader import GenerationReader


@dataclass(frozen=True, slots=True)
class StoredArray:
    """A leaf as tiles; a whole leaf is a single tile.

    Attributes:
        spec: Name, type and whole shape.
        tiles: Its tiles, which make up the leaf.
    """

    spec: LeafSpec
    tiles: tuple[StoredTile, ...]

    @property
    def is_whole(self) -> bool:
        """Whether one tile is the leaf, so that its bytes are a run in a file."""
        return [tile.box for tile in self.tiles] == [Box.whole(self.spec.shape)]


def stored_array(
    reader: GenerationReader,
    state: str,
    leaf: StoredLeaf | CutLeaf,
    *,
    needs_all: bool = True,
) -> StoredArray:
    """Return where the bytes of a leaf are.

    Not collective. Thread-safe.

    Args:
        reader: The open generation.
        state: Name of the leaf's state.
        leaf: A leaf of the manifest.
        needs_all: Whether to refuse a leaf of which other hosts have some tiles.

    Raises:
        CorruptGenerationError: On the calling rank, if the tables of tiles are damaged.
        ReadError: On the calling rank, if the operating system cannot read them, or some
            are on other hosts.
    """
    if isinstance(leaf, CutLeaf):
        tiles = reader.tiles()[state, leaf.spec.name]
        if needs_all and len(tiles) < leaf.tiles:
            raise ReadError(
                f"state {state!r}, leaf {leaf.spec.name!r}: {len(tiles)} of its "
                f"{leaf.tiles} tiles are in {reader.path}, the others are on other hosts",
                path=reader.path,
            )
        return StoredArray(leaf.spec, tiles)
    whole = Box.whole(leaf.spec.shape)
    return StoredArray(leaf.spec, (StoredTile(whole, leaf),))


def state_arrays(
    reader: GenerationReader, state: StoredState, *, needs_all: bool = True
) -> list[StoredArray]:
    """Return the whole leaves and the cut leaves of a state; see `stored_array`.

    Not collective. Thread-safe.
    """
    leaves: list[StoredLeaf | CutLeaf] = [*state.leaves, *state.cut]
    return [stored_array(reader, state.name, leaf, needs_all=needs_all) for leaf in leaves]


def read_box(
    reader: GenerationReader, array: StoredArray, box: Box, into: memoryview
) -> None:
    """Read a box of a leaf; reads and proves each block that has bytes of it once.

    Not collective. Thread-safe.

    Args:
        reader: The open generation.
        array: The leaf.
        box: A box in it.
        into: Receives the bytes of the box, in its C order.

    Raises:
        CorruptGenerationError: On the calling rank, if a block is not the saved block.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    if not box.size:
        return
    width = dtypes.element_bytes(array.spec.dtype)
    wanted = _in_bytes(box, width)
    memory = np.frombuffer(into, np.uint8).reshape(wanted.shape)
    for tile in array.tiles:
        if intersection(tile.box, box) is None:
            continue
        for block, boxes in _blocks(tile, width, reader.manifest.block_bytes):
            if any(intersection(one, wanted) for one in boxes):
                data = np.frombuffer(reader.read_block(tile.leaf, block), np.uint8)
                _place(data, boxes, memory, wanted)


def slabs(shape: tuple[int, ...], elements: int) -> Iterator[Box]:
    """Cut an array into boxes that follow one another in C order. Not collective.

    Args:
        shape: The array's lengths, in elements.
        elements: Largest number of elements of a box.

    Returns:
        Boxes of consecutive elements; together they are the array.
    """
    axis, row = len(shape), 1
    while axis > 0 and row * shape[axis - 1] <= elements:
        axis -= 1
        row *= shape[axis]
    if axis == 0:
        yield Box.whole(shape)
        return
    length, count = shape[axis - 1], max(1, elements // row)
    ranges = [range(n) for n in shape[: axis - 1]]
    for first in product(*ranges):
        for start in range(0, length, count):
            offset = (*first, start, *(0,) * (len(shape) - axis))
            rows = min(count, length - start)
            yield Box(offset, (*(1,) * (axis - 1), rows, *shape[axis:]))


def _in_bytes(box: Box, width: int) -> Box:
    return Box((*box.offset, 0), (*box.shape, width))


def _blocks(
    tile: StoredTile, width: int, block_bytes: int
) -> Iterator[tuple[int, list[Box]]]:
    """Give each block of a tile, and the boxes of its bytes, in their order."""
    whole, size = _in_bytes(tile.box, width), tile.leaf.extent.nbytes
    for block, start in enumerate(range(0, size, block_bytes)):
        yield block, boxes_of_run(whole, start, min(start + block_bytes, size))


def _place(
    data: NDArray[np.uint8], boxes: list[Box], memory: NDArray[np.uint8], wanted: Box
) -> None:
    """Copy the parts of a block's boxes that are wanted to their places."""
    start = 0
    for box in boxes:
        part = data[start : start + box.size].reshape(box.shape)
        start += box.size
        shared = intersection(box, wanted)
        if shared is not None:
            memory[_inside(shared, wanted)] = part[_inside(shared, box)]


def _inside(part: Box, whole: Box) -> tuple[slice, ...]:
    ranges = zip(part.offset, part.shape, whole.offset, strict=True)
    return tuple(slice(start - low, start - low + n) for start, n, low in ranges)


def box_of_index(shape: tuple[int, ...], index: Any) -> tuple[Box, tuple[Any, ...]]:  # noqa: ANN401 (as NumPy's)
    """Return the box that an index needs, and the index within that box. Not collective.

    Args:
        shape: The array's lengths, in elements.
        index: Integers, slices of positive step and at most one ``...``, as for NumPy.

    Raises:
        IndexError: On the calling rank, for an integer out of range, too many or other
            indices.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    dots = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1 or len(items) - len(dots) > len(shape):
        raise IndexError(f"{index!r} has too many indices for an array of shape {shape}")
    place = dots[0] if dots else len(items)
    missing = len(shape) - (len(items) - len(dots))
    items[place : place + 1] = [slice(None)] * missing
    ranges = [_range(item, length) for item, length in zip(items, shape, strict=True)]
    offset = tuple(first for first, _, _ in ranges)
    lengths = tuple(length for _, length, _ in ranges)
    return Box(offset, lengths), tuple(within for _, _, within in ranges)


def _range(item: Any, length: int) -> tuple[int, int, int | slice]:  # noqa: ANN401
    """Return first index and length of a dimension's part, and the index within it."""
    if isinstance(item, slice):
        start, stop, step = item.indices(length)
        if step < 0:
            raise IndexError("a slice with a negative step: read it forwards, then flip it")
        return start, max(0, stop - start), slice(None, None, step)
    if isinstance(item, (bool, np.bool_)) or not hasattr(item, "__index__"):
        raise IndexError(f"{item!r} is no index of a lazy leaf: use integers and slices")
    number = item.__index__()
    if not -length <= number < length:
        raise IndexError(f"{number} is out of range for a dimension of {length}")
    return number % length, 1, 0
