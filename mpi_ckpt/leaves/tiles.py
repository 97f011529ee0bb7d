# SPDX-License-Identifier: Apache-2.0
"""Makes leaves that are cut over the ranks from their tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.errors import StageError
from mpi_ckpt.leaves.leaf import Leaf

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mpi_ckpt.leaves.leaf import Gate, LeafSpec, Place, Tile

__all__ = ["cut_leaf"]


def cut_leaf(
    spec: LeafSpec,
    tiles: Iterable[Tile],
    gate: Gate | None = None,
    *,
    is_concatenated: bool = False,
) -> Leaf:
    """Make a leaf that is cut over the ranks. Not collective.

    Args:
        spec: Name, type and whole shape.
        tiles: This rank's tiles.
        gate: As that of `Leaf`.
        is_concatenated: As that of `Leaf`.
    """
    taken = tuple(tiles)
    return Leaf(spec, _CutBuffer(taken), gate, taken, is_concatenated)


class _CutBuffer:
    """Stands in for the memory of a cut leaf, which is in its tiles. Not collective."""

    def __init__(self, tiles: tuple[Tile, ...]) -> None:
        self._tiles = tiles

    def view(self) -> memoryview | None:
        return None

    def read(self) -> memoryview:
        raise StageError("it is cut over the ranks: no rank has all its bytes")

    def copy_to(self, _: memoryview) -> None:
        self.read()

    write = copy_to

    def stamp(self) -> int:
        return sum(tile.buffer.stamp() for tile in self._tiles)

    def place(self) -> Place | None:
        return None

    def span(self) -> tuple[int, int]:
        return 0, 0
