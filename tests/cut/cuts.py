# SPDX-License-Identifier: Apache-2.0
"""Ways to cut a global array over ranks: boxes of each rank, and blocks of them."""

import itertools

import numpy as np

from mpi_ckpt import Block

SHAPE = (7, 5, 6)


def rows(shape, size):
    """Return for each rank the box of its rows."""
    cuts = [shape[0] * rank // size for rank in range(size + 1)]
    return [
        [((first, *(0 for _ in shape[1:])), (end - first, *shape[1:]))]
        for first, end in itertools.pairwise(cuts)
    ]


def columns(shape, size):
    """Return for each rank the box of its part of the last dimension."""
    cuts = [shape[-1] * rank // size for rank in range(size + 1)]
    return [
        [((*(0 for _ in shape[1:]), first), (*shape[:-1], end - first))]
        for first, end in itertools.pairwise(cuts)
    ]


def grid(shape, size):
    """Return for each rank the box of its place in a grid of two dimensions."""
    down = 2 if size % 2 == 0 else 1
    across = size // down
    return [
        [
            (
                (shape[0] * i // down, shape[1] * j // across, *(0 for _ in shape[2:])),
                (
                    shape[0] * (i + 1) // down - shape[0] * i // down,
                    shape[1] * (j + 1) // across - shape[1] * j // across,
                    *shape[2:],
                ),
            )
        ]
        for i in range(down)
        for j in range(across)
    ]


def uneven(shape, size):
    """Return rows, of which the first rank has one, the last most."""
    cuts = [*range(size), shape[0]]
    return [
        [((first, *(0 for _ in shape[1:])), (end - first, *shape[1:]))]
        for first, end in itertools.pairwise(cuts)
    ]


def last_has_all(shape, size):
    """Return the whole array on the last rank, nothing on the others."""
    return [*([] for _ in range(size - 1)), [(tuple(0 for _ in shape), tuple(shape))]]


def several(shape, size):
    """Return single rows, dealt to the ranks in turn."""
    return [
        [
            ((row, *(0 for _ in shape[1:])), (1, *shape[1:]))
            for row in range(rank, shape[0], size)
        ]
        for rank in range(size)
    ]


CUTS = [rows, columns, grid, uneven, last_has_all, several]


def whole_array(shape, dtype=np.float64):
    """Return an array with other bytes in each element."""
    count = int(np.prod(shape))
    data = np.random.default_rng(count).bytes(count * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def blocks(whole, boxes, *, ghosts=0, periodic=False, filled=True, order="C"):
    """Return blocks with the contents of a whole array, or with zeros."""
    made = []
    for offset, length in boxes:
        array = np.zeros([n + 2 * ghosts for n in length], whole.dtype, order=order)
        inner = array[tuple(slice(ghosts, ghosts + n) for n in length)]
        if filled:
            inner[...] = whole[box_slices(offset, length)]
        made.append(
            Block(array, shape=whole.shape, offset=offset, ghosts=ghosts, periodic=periodic)
        )
    return made


def box_slices(offset, length):
    """Return the slices of a box."""
    return tuple(slice(o, o + n) for o, n in zip(offset, length, strict=True))


def expected(whole, offset, length, *, ghosts, periodic):
    """Return what a restored block holds: zeros where no owner fills its ghost cells."""
    if periodic:
        indices = [
            np.arange(o - ghosts, o + n + ghosts) % size
            for o, n, size in zip(offset, length, whole.shape, strict=True)
        ]
        return whole[np.ix_(*indices)]
    padded = np.pad(whole, ghosts)
    return padded[
        tuple(slice(o, o + n + 2 * ghosts) for o, n in zip(offset, length, strict=True))
    ]
