# SPDX-License-Identifier: Apache-2.0
"""Any box of any leaf is put together from the blocks that hold it, and from no others."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.storage.reading.assembly import read_box, slabs, state_arrays
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.cutting import CutArray, bytes_of, write_cut


@st.composite
def cut_arrays(draw: st.DrawFn) -> CutArray:
    """Draw an array of up to three dimensions, cut again and again across any axis."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    dtype = draw(st.sampled_from(["i1", "<f8", "S3", "<c16"]))
    size = math.prod(shape)
    width = np.dtype(dtype).itemsize
    flat = np.arange(1, 1 + size * width).astype(np.uint8).view(dtype)
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.shape[axis]))
        for start, length in ((0, at), (at, box.shape[axis] - at)):
            offset, part = list(box.offset), list(box.shape)
            offset[axis] += start
            part[axis] = length
            if length:
                boxes.append(Box(tuple(offset), tuple(part)))
    ranks: list[list[Box]] = [[], [], []]
    for box in boxes:
        ranks[draw(st.integers(0, 2))].append(box)
    return CutArray(flat.reshape(shape), ranks)


@given(st.data())
def test_any_box_is_read_from_the_blocks_that_hold_it(tmp_path_factory, data):
    cut = data.draw(cut_arrays())
    offset, shape = [], []
    for length in cut.array.shape:
        offset.append(data.draw(st.integers(0, length - 1)))
        shape.append(data.draw(st.integers(0, length - offset[-1])))
    box = Box(tuple(offset), tuple(shape))
    block_bytes = data.draw(st.integers(1, 50))
    path = write_cut(
        tmp_path_factory.mktemp("c"),
        {"x": cut},
        whole={"y": cut.array},
        block_bytes=block_bytes,
    )
    expected = bytes_of(cut.array, box) if box.size else memoryview(b"")
    with GenerationReader(path) as reader:
        for array in state_arrays(reader, reader.manifest.states[0]):
            read: list[tuple[str, int]] = []

            def note(leaf, block, read=read, real=reader.read_block):
                read.append((leaf.spec.name, block))
                return real(leaf, block)

            memory = bytearray(len(expected))
            watched = type("Watched", (), {"manifest": reader.manifest})()
            watched.read_block = note
            read_box(watched, array, box, memoryview(memory))
            assert memory == expected
            assert len(set(read)) == len(read)
            assert set(read) == holding(array, box, block_bytes)


def holding(array, box: Box, block_bytes: int) -> set[tuple[str, int]]:
    """Return the blocks that have bytes of a box, found byte by byte."""
    found = set()
    for tile in array.tiles:
        width = tile.leaf.extent.nbytes // tile.box.size
        for number, place in enumerate(np.ndindex(*tile.box.shape)):
            index = [a + b for a, b in zip(tile.box.offset, place, strict=True)]
            inside = all(
                o <= i < e for o, i, e in zip(box.offset, index, box.end, strict=True)
            )
            if inside:
                first, last = number * width, number * width + width - 1
                blocks = range(first // block_bytes, last // block_bytes + 1)
                found |= {(tile.leaf.spec.name, block) for block in blocks}
    return found


@given(st.lists(st.integers(0, 6), max_size=4).map(tuple), st.integers(1, 50))
def test_slabs_are_the_array_in_c_order(shape, elements):
    array = np.arange(math.prod(shape)).reshape(shape)
    boxes = list(slabs(shape, elements))
    joined = [
        array[tuple(slice(o, e) for o, e in zip(b.offset, b.end, strict=True))].ravel()
        for b in boxes
    ]
    assert np.concatenate([*joined, []]).tolist() == array.ravel().tolist()
    assert all(box.size <= elements for box in boxes)
