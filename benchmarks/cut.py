# SPDX-License-Identifier: Apache-2.0
"""Arrays that are cut over the ranks: what each rank has of them, for any grid of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt import Block, ShardedArrayState

if TYPE_CHECKING:
    from mpi4py import MPI

    from benchmarks.setting import Arrays

__all__ = ["CutArrays", "whole_side"]

NAMES = tuple(f"field-{number}" for number in range(4))
_ITEM_BYTES = 4
# Multiples of two irrationals: neighbours in any direction differ, and nothing repeats.
_ROW_STEP, _COLUMN_STEP, _ARRAY_STEP = 0.618034, 0.414214, 0.1


def whole_side(nbytes: int, ranks: int) -> int:
    """Return rows and columns of square arrays that have so many bytes together. Pure.

    Args:
        nbytes: Bytes of all arrays.
        ranks: The largest number of ranks that divides the side.
    """
    side = math.isqrt(nbytes // (_ITEM_BYTES * len(NAMES)))
    return max(1, side // ranks) * ranks


@dataclass(frozen=True, slots=True)
class CutArrays:
    """One rank's boxes of a few square float32 arrays.

    Attributes:
        side: Rows, and columns, of each whole array.
        dims: Ranks along the rows and the columns.
        rows: Range of the rank's rows.
        columns: Range of its columns.
        arrays: Name -> its elements.
    """

    side: int
    dims: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    arrays: Arrays

    @classmethod
    def make(cls, rank: int, dims: tuple[int, int], side: int) -> CutArrays:
        """Make a rank's boxes, with their contents. Not collective.

        Args:
            rank: The rank; the last dimension of the grid is the fastest.
            dims: Ranks along the rows and the columns.
            side: Rows and columns of the whole arrays.
        """
        cut = cls(side, dims, *cls.ranges(rank, dims, side), {})
        cut.arrays.update({name: cut._contents(name) for name in NAMES})
        return cut

    @staticmethod
    def ranges(
        rank: int, dims: tuple[int, int], side: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the rows and the columns of a rank. Pure."""
        row, column = divmod(rank, dims[1])
        return (
            (side * row // dims[0], side * (row + 1) // dims[0]),
            (side * column // dims[1], side * (column + 1) // dims[1]),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arrays."""
        return len(NAMES) * self.side**2 * _ITEM_BYTES

    @property
    def box(self) -> tuple[slice, slice]:
        """The place of this rank's elements in a whole array."""
        return slice(*self.rows), slice(*self.columns)

    def state(self) -> ShardedArrayState:
        """Return the state of these boxes. Not collective."""
        shape, offset = (self.side, self.side), (self.rows[0], self.columns[0])
        blocks = {
            name: Block(array, shape=shape, offset=offset)
            for name, array in self.arrays.items()
        }
        return ShardedArrayState("fields", blocks)

    def fill(self) -> None:
        """Write the contents with which the boxes were made. Not collective."""
        for name, array in self.arrays.items():
            array[:] = self._contents(name)

    def clear(self) -> None:
        """Overwrite all elements. Not collective."""
        for array in self.arrays.values():
            array.fill(-1)

    def check(self, comm: MPI.Intracomm, who: str) -> None:
        """Require the contents with which the boxes were made. Collective.

        Args:
            comm: All ranks, also those without boxes.
            who: The contender, for the error.

        Raises:
            RuntimeError: On every rank, with the ranks that have other contents.
        """
        right = all(
            np.array_equal(array, self._contents(name))
            for name, array in self.arrays.items()
        )
        wrong = [rank for rank, one in enumerate(comm.allgather(right)) if not one]
        if wrong:
            raise RuntimeError(f"{who} brought other bytes than were saved: ranks {wrong}")

    def _contents(self, name: str) -> np.ndarray:
        """Return the elements of this rank's box: they follow from their places."""
        first = _ARRAY_STEP * NAMES.index(name)
        rows = (first + _ROW_STEP * np.arange(*self.rows)) % 1
        columns = (_COLUMN_STEP * np.arange(*self.columns)) % 1
        return np.add.outer(rows.astype(np.float32), columns.astype(np.float32))
