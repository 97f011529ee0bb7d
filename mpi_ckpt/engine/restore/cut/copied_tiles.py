# SPDX-License-Identifier: Apache-2.0
"""Finds the tiles of a copy in memory on the ranks that hold them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.comm import gather_bytes, on_root
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import RestoreError, cut_lines
from mpi_ckpt.leaves.digest import Digest
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage.format.manifest import Extent, StoredLeaf, StoredTile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.engine.outline import Outline, StateOutline
    from mpi_ckpt.engine.restore.cut.wanted import LeafIndex
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.memory import TileShare
    from mpi_ckpt.storage.reading.read_plan import Window

_LOOKING = "looking for the tiles of a copy in memory"
_LINES_MAX = 16
# What is in memory is not proven again.
_UNPROVEN = Digest(())


@dataclass(frozen=True, slots=True)
class HeldTiles:
    """What the ranks hold of the tiles of a copy; on root.

    Attributes:
        tiles: State and leaf -> its tiles, each with its file and its place in that.
        holders: File -> the ranks that hold it.
    """

    tiles: Mapping[tuple[str, str], Sequence[tuple[Box, str, int]]]
    holders: Mapping[str, Sequence[int]]

    @classmethod
    def join(cls, encoded: Sequence[bytes]) -> HeldTiles:
        """Join what each rank holds, in rank order. Not collective. Thread-safe."""
        tiles: dict[tuple[str, str], list[tuple[Box, str, int]]] = {}
        holders: dict[str, list[int]] = {}
        for rank, shares in enumerate(map(json.loads, encoded)):
            for owner, table in shares:
                file = _share_name(owner)
                holders.setdefault(file, []).append(rank)
                if len(holders[file]) > 1:
                    continue
                for state, leaf, offset, shape, place in table:
                    box = Box(tuple(offset), tuple(shape))
                    tiles.setdefault((state, leaf), []).append((box, file, place))
        return cls(tiles, holders)

    def lacking(self, outline: Outline) -> list[str]:
        """Return the leaves of a copy of which tiles are lost. Not collective."""
        return [
            f"state {state.name!r}, leaf {leaf.name!r}"
            for state in outline.states
            for leaf in state.cut
            if math.prod(leaf.shape)
            != sum(box.size for box, _, _ in self.tiles.get((state.name, leaf.name), ()))
        ]

    def stored(
        self, states: Sequence[StateOutline], traded: Sequence[LeafIndex]
    ) -> list[tuple[int, StoredTile]]:
        """Return the tiles of some leaves, as if they were in files. Not collective.

        A leaf that was whole is a tile that root holds.
        """
        stored: list[tuple[int, StoredTile]] = []
        for number, (state, at) in enumerate(traded):
            saved = states[state]
            spec = saved.leaves[at]
            places = [(Box.whole(spec.shape), _leaf_name(saved.name, at), 0)]
            if at >= len(saved.specs):
                places = list(self.tiles.get((saved.name, spec.name), ()))
            for box, file, place in places:
                tile = LeafSpec(spec.name, spec.dtype, box.shape)
                extent = Extent(file, place, tile.nbytes)
                stored.append(
                    (number, StoredTile(box, StoredLeaf(tile, extent, _UNPROVEN)))
                )
        return stored


def find_held(session: Session, found: OpenGeneration) -> tuple[HeldTiles | None, str]:
    """Find which ranks hold the tiles of a copy.

    Collective. Main thread only.

    Returns:
        What they hold, on root; and on every rank what is lost, empty for nothing.
    """
    comm = session.comm
    mine = [[one.rank, json.loads(one.table)] for one in _shares(session, found)]
    gathered = gather_bytes(comm, json.dumps(mine).encode(), _LOOKING)
    held = HeldTiles.join(gathered) if comm.is_root else None

    def judge() -> str:
        lacking = [] if held is None else held.lacking(found.outline)
        return cut_lines("\n  ".join(lacking), _LINES_MAX)

    return held, on_root(comm, _LOOKING, judge, error=RestoreError)


class CopiedWindows:
    """Gives windows of what this rank holds of a copy, in place of files. Not collective.

    Args:
        memories: The memory of each file.
        windows: What is read of them, in order.
    """

    def __init__(
        self, memories: Mapping[str, memoryview], windows: Sequence[Window]
    ) -> None:
        self._memories = memories
        self._windows = iter(windows)

    def take(self) -> tuple[memoryview, None]:
        """Return the next window, without a copy."""
        window = next(self._windows)
        return self._memories[window.file][window.start : window.end], None

    def release(self) -> None:
        """Do nothing: the memory is kept."""

    close = release


def held_memories(session: Session, found: OpenGeneration) -> dict[str, memoryview]:
    """Return what this rank holds of a copy, by the names of files in a plan.

    Not collective.
    """
    memories = {_share_name(one.rank): one.data for one in _shares(session, found)}
    if session.comm.is_root and found.copy is not None:
        for state, leaves in found.copy.leaves.items():
            memories |= {_leaf_name(state, at): leaf for at, leaf in enumerate(leaves)}
    return memories


def _shares(session: Session, found: OpenGeneration) -> Sequence[TileShare]:
    memory = session.memory
    return () if memory is None else memory.shares.get(found.outline.copy, ())


def _share_name(rank: int) -> str:
    return f"tiles of rank {rank}"


def _leaf_name(state: str, number: int) -> str:
    return f"{number} of {state}"
