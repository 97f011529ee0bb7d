# SPDX-License-Identifier: Apache-2.0
"""Draws arrays, ways to cut them, and memory of any layout for the parts; checks the parts.

All from one random stream, which is the same on every rank.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mpi_ckpt import Block
from tests.cut import cuts

DTYPES = [
    *("f8", "f4", "f2", "i8", "u1", "?", "c8", "c16", ">i4", ">f8", "M8[s]", "S3", "U2"),
    [("a", "i2"), ("b", "u1")],
]
_UNTOUCHED = 0x5A


def array(random, *, rows=None):
    """Draw a whole array: other bytes in each element, though some dtypes have few.

    Args:
        random: The random stream.
        rows: Length of the first dimension; drawn if None.
    """
    shape = [random.randint(0, 6) for _ in range(random.randint(0, 4))]
    if rows is not None:
        shape = [rows, *shape[:3]]
    dtype = np.dtype(random.choice(DTYPES))
    numbers = np.random.default_rng(random.randrange(1 << 30))
    values = numbers.integers(0, 2 if dtype.kind == "b" else 100, shape)
    if dtype.names:
        made = np.zeros(shape, dtype)
        for name in dtype.names:
            made[name] = values
        return made
    return np.asarray(values).astype(dtype)


def parts(random, shape, size):
    """Draw boxes that tile a domain: ranks may have none, and some boxes have replicas."""
    dealt = cuts.drawn(random, shape, size, depth=random.randint(0, 6) if shape else 0)
    for boxes in dealt:
        for box in list(boxes):
            other = dealt[random.randrange(size)]
            if random.random() < 0.3 and box not in other:
                other.append(box)
    return [list(dict.fromkeys(boxes)) for boxes in dealt]


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


def part(random, whole, box, *, ghosts):
    """Draw memory of some layout for a box of a whole array.

    Args:
        random: The random stream of a rank.
        whole: The whole array.
        box: Offset and shape of the interior.
        ghosts: Whether to draw ghost cells around it.
    """
    offset, length = box
    around = [
        (random.randint(0, 2), random.randint(0, 2)) if ghosts else (0, 0) for _ in length
    ]
    turns = [ghosts and n > 0 and random.random() < 0.5 for n in whole.shape]
    shape = [n + low + high for n, (low, high) in zip(length, around, strict=True)]
    axes = len(shape)
    order = random.sample(range(axes), axes)
    steps = [random.choice([1, 1, 2]) for _ in shape]
    is_torch = torch_takes(whole.dtype) and random.random() < 0.4
    if not is_torch:
        steps = [step * random.choice([1, 1, -1]) for step in steps]
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
    given = torch.from_numpy(memory).permute(back)[index] if is_torch else laid_out(memory)
    block = Block(given, shape=whole.shape, offset=offset, ghosts=around, periodic=turns)
    return Part(block, laid_out(base), base, is_own)


def torch_takes(dtype):
    return dtype.kind in "fiub" and dtype.isnative and dtype.itemsize <= 8
