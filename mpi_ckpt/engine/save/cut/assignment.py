# SPDX-License-Identifier: Apache-2.0
"""Defines which tiles a rank writes: what root tells it after joining all forms. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage.format.tile_table import TileEntry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class TileNumber(NamedTuple):
    """Which of a rank's tiles: the number of its form, and of the tile in it."""

    form: int
    tile: int


def handing_order(entry: TileEntry) -> tuple[str, str, Box]:
    """Return the key by which both sides sort tiles that are handed over.

    Not collective. Thread-safe.
    """
    return entry.state, entry.spec.name, entry.box


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a rank must know to write its tiles.

    Attributes:
        owned: The tiles that it writes.
        compared: Those of its tiles that other ranks have as well.
        rows: Number of a concatenated form -> all rows, and the first of this rank.
        writer: The rank that writes them; maybe itself.
        carried: Rank -> its tiles, if this rank writes those too.
    """

    owned: tuple[TileNumber, ...]
    compared: tuple[TileNumber, ...]
    rows: Mapping[int, tuple[int, int]]
    writer: int
    carried: Mapping[int, tuple[TileEntry, ...]]

    def encode(self) -> bytes:
        """Return the assignment as bytes. Not collective. Thread-safe."""
        rows = [[form, *counts] for form, counts in self.rows.items()]
        carried = [
            [rank, [[one.state, one.spec.to_json(), one.box] for one in entries]]
            for rank, entries in self.carried.items()
        ]
        return json.dumps([self.owned, self.compared, rows, self.writer, carried]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Assignment:
        """Return the assignment that `encode` encoded. Not collective. Thread-safe."""
        owned, compared, rows, writer, carried = json.loads(data)
        return cls(
            tuple([TileNumber(*one) for one in owned]),
            tuple([TileNumber(*one) for one in compared]),
            {form: (total, first) for form, total, first in rows},
            writer,
            {
                rank: tuple(
                    [
                        TileEntry(state, as_leaf_spec(*spec), as_box(*box))
                        for state, spec, box in entries
                    ]
                )
                for rank, entries in carried
            },
        )


def as_box(offset: Sequence[int], shape: Sequence[int]) -> Box:
    """Return a box from its JSON values. Not collective. Thread-safe."""
    return Box(tuple(offset), tuple(shape))


def as_leaf_spec(name: str, dtype: str, shape: Sequence[int]) -> LeafSpec:
    """Return a spec from its JSON values; one object for equal ones.

    Not collective. Thread-safe. All ranks have the same leaves, so root reads each as often
    as there are ranks.
    """
    return _spec(name, dtype, tuple(shape))


@lru_cache(maxsize=1 << 14)
def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> LeafSpec:
    return LeafSpec(name, dtype, shape)
