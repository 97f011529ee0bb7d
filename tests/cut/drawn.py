# SPDX-License-Identifier: Apache-2.0
"""Draws jobs: arrays, and the programs that save and restore them, cut in any way.

All that is drawn is plain data, so that one rank can draw for all; a rank makes of it the
memory of its own parts, and checks them after a restore.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from mpi_ckpt import Block
from mpi_ckpt.options import IO
from tests.cut import cuts

DTYPES = [
    *("f8", "f4", "f2", "i8", "u1", "?", "c8", "c16", ">i4", ">f8", "M8[s]", "S3", "U2"),
    [("a", "i2"), ("b", "u1")],
]
KINDS = ("cut", "rows", "whole")
_UNTOUCHED = 0x5A


@dataclass(frozen=True)
class Values:
    """A whole array: other bytes in each element, though some dtypes have few.

    Attributes:
        shape: Its shape.
        dtype: What makes its dtype.
        seed: Of its values.
    """

    shape: tuple[int, ...]
    dtype: object
    seed: int

    def array(self):
        """Return the array; the same on every rank."""
        dtype = np.dtype(self.dtype)
        numbers = np.random.default_rng(self.seed)
        values = numbers.integers(0, 2 if dtype.kind == "b" else 100, self.shape)
        if not dtype.names:
            return np.asarray(values).astype(dtype)
        made = np.zeros(self.shape, dtype)
        for name in dtype.names:
            made[name] = values
        return made


@dataclass(frozen=True)
class Layout:
    """The memory of a box.

    Attributes:
        ghosts: For each dimension, the ghost cells at its two ends.
        periodic: For each dimension, whether they wrap around.
        order: The order of the dimensions in memory.
        steps: For each dimension, from an element to the next; negative: backwards.
        is_torch: Whether it is a tensor's.
    """

    ghosts: tuple[tuple[int, int], ...]
    periodic: tuple[bool, ...]
    order: tuple[int, ...]
    steps: tuple[int, ...]
    is_torch: bool


@dataclass(frozen=True)
class Program:
    """How a job has its arrays.

    Attributes:
        kind: Whole on each rank, in boxes, or as rows.
        size: Its ranks.
        boxes: For each array and rank: offset, shape and memory of its boxes.
        rows: Where the rows of the ranks begin and end; a rank may have none.
    """

    kind: str
    size: int
    boxes: dict[str, list[list[tuple[tuple[int, ...], tuple[int, ...], Layout]]]]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """Arrays, a program that saves them, and one that restores them.

    Attributes:
        arrays: The arrays.
        saved: The program that saves.
        wanted: The program that restores.
        writing: The options of the first.
        reading: The options of the second.
        block_bytes: Block length of the digests, where a test writes the files.
    """

    arrays: dict[str, Values]
    saved: Program
    wanted: Program
    writing: dict[str, object]
    reading: dict[str, object]
    block_bytes: int


@st.composite
def jobs(draw, kinds, sizes):
    """Draw a job.

    Args:
        draw: Hypothesis.
        kinds: How the program that saves has its arrays, and the one that restores.
        sizes: The ranks of these programs.
    """
    rows = draw(_lengths(6)) if "rows" in kinds else None
    arrays = {f"a{n}": draw(values(rows)) for n in range(draw(st.integers(1, 4)))}
    programs = [
        draw(_programs(kind, arrays, rows or 0, size))
        for kind, size in zip(kinds, sizes, strict=True)
    ]
    writing = {
        "writers": draw(st.sampled_from(["root", "all", "node"])),
        "asynchronous": draw(st.booleans()),
        "io": draw(_io()),
    }
    block_bytes = draw(st.sampled_from([1, 3, 8, 64]))
    return Job(arrays, *programs, writing, {"io": draw(_io())}, block_bytes)


@st.composite
def values(draw, rows=None):
    """Draw a whole array of up to six dimensions; with so many rows, unless None."""
    axes = draw(st.integers(0 if rows is None else 1, 6))
    # Some thousand elements at most.
    lengths = st.integers(1, 6 if axes < 5 else 3)
    shape = draw(st.lists(lengths, min_size=axes, max_size=axes))
    if axes and draw(_seldom()):
        shape[draw(st.integers(0, axes - 1))] = 0
    if rows is not None:
        shape[0] = rows
    return Values(tuple(shape), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))


def _lengths(most):
    return st.sampled_from([*range(1, most + 1), 0])


def _seldom():
    return st.sampled_from([*[False] * 7, True])


@st.composite
def _programs(draw, kind, arrays, rows, size):
    boxes = {}
    if kind == "cut":
        boxes = {name: draw(_parts(one, size)) for name, one in arrays.items()}
    inner = draw(st.lists(st.integers(0, rows), min_size=size - 1, max_size=size - 1))
    return Program(kind, size, boxes, (0, *sorted(inner), rows))


@st.composite
def _parts(draw, whole, size):
    """Draw boxes that tile an array: ranks may have none, two may have the same."""
    boxes = [((0,) * len(whole.shape), whole.shape)]
    for _ in range(draw(st.integers(0, 6)) if whole.shape else 0):
        offset, length = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(length) - 1))
        at = draw(st.integers(0, length[axis]))
        low, high, start = list(length), list(length), list(offset)
        low[axis], high[axis] = at, length[axis] - at
        start[axis] += at
        boxes += [(offset, tuple(low)), (tuple(start), tuple(high))]
    dealt = [{} for _ in range(size)]
    ranks = st.lists(st.integers(0, size - 1), min_size=1, max_size=2, unique=True)
    for box in boxes:
        for rank in draw(ranks):
            dealt[rank][box] = (*box, draw(_layouts(whole, box)))
    return [list(of_rank.values()) for of_rank in dealt]


@st.composite
def _layouts(draw, whole, box):
    axes = len(whole.shape)
    wide = st.integers(0, 2 if axes < 5 else 1)
    ghosts = tuple((draw(wide), draw(wide)) for _ in range(axes))
    periodic = tuple(n > 0 and draw(st.booleans()) for n in whole.shape)
    is_torch = torch_takes(np.dtype(whole.dtype)) and draw(st.booleans())
    steps = [1 if is_torch else draw(st.sampled_from([1, -1])) for _ in range(axes)]
    # Gaps in two dimensions at most: in six there would be 63 times as many as elements.
    for axis in draw(st.lists(st.integers(0, max(0, axes - 1)), max_size=min(2, axes))):
        steps[axis] *= 2
    order = tuple(draw(st.permutations(range(axes))))
    return Layout(ghosts, periodic, order, tuple(steps), is_torch)


@st.composite
def _io(draw):
    return IO(
        window_bytes=draw(st.sampled_from([1 << 20, 4096, 64, 1])),
        mode=draw(st.sampled_from(["auto", "direct", "buffered"])),
        readers=draw(st.sampled_from(["root", "node", "all"])),
    )


@dataclass
class Part:
    """A box of a whole array in memory of some layout.

    Attributes:
        block: The block.
        cells: The bytes of its elements: one more dimension.
        base: The bytes of all the memory that it lies in.
        is_own: Which of these bytes are of its elements.
    """

    block: Block
    cells: np.ndarray
    base: np.ndarray
    is_own: np.ndarray

    def fill(self, whole):
        """Put the interior's values into the interior, whatever is around it."""
        shape = self.cells.shape[:-1]
        inner = tuple(
            slice(low, size - high)
            for (low, high), size in zip(self.block.ghosts, shape, strict=True)
        )
        box = cuts.box_slices(self.block.offset, self.cells[inner].shape[:-1])
        self.cells[inner] = bytes_of(whole)[box]

    def problem(self, whole):
        """Return what is wrong after a restore, if anything."""
        want = np.full_like(self.cells, _UNTOUCHED)
        inside, sources = [], []
        for offset, size, length, (low, _), turns in zip(
            *(self.block.offset, self.cells.shape[:-1], whole.shape),
            *(self.block.ghosts, self.block.periodic),
            strict=True,
        ):
            at = np.arange(offset - low, offset - low + size)
            known = np.ones(size, bool) if turns else (at >= 0) & (at < length)
            inside.append(np.flatnonzero(known))
            sources.append(at[known] % max(1, length))
        if whole.size:
            every = np.arange(whole.itemsize)
            want[np.ix_(*inside, every)] = bytes_of(whole)[np.ix_(*sources, every)]
        if not np.array_equal(self.cells, want):
            return f"{self.block}: other elements than were saved"
        if (self.base[~self.is_own] != _UNTOUCHED).any():
            return f"{self.block}: memory between its elements was changed"
        return None


def bytes_of(values):
    """Return the bytes of each element of an array: one more dimension."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return flat.reshape(*values.shape, values.itemsize)


def part(whole, offset, length, layout):
    """Make the memory of a box of a whole array, as it was drawn.

    Args:
        whole: The whole array.
        offset: Of the interior.
        length: Shape of the interior.
        layout: The memory.
    """
    shape = [n + low + high for n, (low, high) in zip(length, layout.ghosts, strict=True)]
    axes, order, steps = len(shape), layout.order, layout.steps
    base = np.full(
        (*(shape[axis] * abs(steps[axis]) for axis in order), whole.itemsize),
        _UNTOUCHED,
        np.uint8,
    )
    back = [order.index(axis) for axis in range(axes)]
    index = (*(slice(None, None, step) for step in steps), ...)

    def laid_out(memory):
        rest = range(axes, memory.ndim)
        return memory.transpose(*back, *rest)[index] if memory.ndim else memory

    is_own = np.zeros(base.shape, bool)
    laid_out(is_own)[...] = True
    memory = base.view(whole.dtype)[..., 0]
    if layout.is_torch:
        given = torch.from_numpy(memory).permute(back)[index]
    else:
        given = laid_out(memory)
    block = Block(
        given,
        shape=whole.shape,
        offset=offset,
        ghosts=layout.ghosts,
        periodic=layout.periodic,
    )
    return Part(block, laid_out(base), base, is_own)


def torch_takes(dtype):
    return dtype.kind in "fiub" and dtype.isnative and dtype.itemsize <= 8
