# SPDX-License-Identifier: Apache-2.0
"""Describes boxes inside of boxes whose elements lie in C order in some memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.decomposition.columns import Columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INTEGERS = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}


def elements_of(memory: memoryview | NDArray[np.uint8], unit: int) -> NDArray[Any]:
    """Return a memory as an array of elements, without a copy. Not collective.

    Args:
        memory: Bytes in one run.
        unit: Bytes of an element.
    """
    # NumPy copies integers faster than bytes without a meaning.
    return np.frombuffer(memory, _INTEGERS.get(unit, f"V{unit}"))


@dataclass(frozen=True, slots=True)
class Regions(Columns):
    """Boxes, each inside of an outer box whose elements lie one behind the other.

    Attributes:
        first: Place of each outer box's first element in its memory, in elements; (n,).
        outer: Shapes of the outer boxes, (n, d).
        start: Offsets of the boxes inside of the outer boxes, (n, d).
        shape: Shapes of the boxes, (n, d).
    """

    first: NDArray[np.int64]
    outer: NDArray[np.int64]
    start: NDArray[np.int64]
    shape: NDArray[np.int64]

    def view(self, row: int, elements: NDArray[Any]) -> NDArray[Any]:
        """Return a region's elements in a memory, without a copy. Not collective.

        Args:
            row: Number of the region.
            elements: The memory, as an array of one dimension.
        """
        outer = self.outer[row].tolist()
        first = int(self.first[row])
        size = int(self.outer[row].prod())
        starts, lengths = self.start[row].tolist(), self.shape[row].tolist()
        index = tuple(slice(s, s + n) for s, n in zip(starts, lengths, strict=True))
        view: NDArray[Any] = elements[first : first + size].reshape(outer)[index]
        return view

    def sizes(self) -> NDArray[np.int64]:
        """Return the number of elements of each region, (n,). Not collective."""
        sizes: NDArray[np.int64] = self.shape.prod(axis=1)
        return sizes
