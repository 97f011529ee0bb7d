# SPDX-License-Identifier: Apache-2.0
"""Copies the tiles of cut leaves into the memory of their rank, and of one more."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import agree, exchange_messages, on_root
from mpi_ckpt.engine.save.cut.assignment import as_leaf_spec
from mpi_ckpt.engine.sync.captured import about_leaf
from mpi_ckpt.errors import StageError
from mpi_ckpt.memory import TileShare, round_up

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.save.cut.own_tiles import CapturedTiles
    from mpi_ckpt.engine.save.cut.survey import TileSurvey
    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.memory import Memory
    from mpi_ckpt.state import Structure

_DOING = "remembering tiles"
# Of the bytes of a tile in a share.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class CutContents:
    """The contents of a state with cut leaves, as root has them.

    Attributes:
        structure: Its JSON values.
        cut: Its cut leaves.
    """

    structure: Structure
    cut: tuple[LeafSpec, ...]


@dataclass(frozen=True, slots=True)
class RememberedTiles:
    """A copy whose tiles are all in the memory of the ranks; the same on every rank.

    Attributes:
        name: Name of the copy, which begins with its number.
        states: The states with cut leaves.
    """

    name: str = ""
    states: Mapping[str, CutContents] = field(default_factory=dict)

    def keep(self, memory: Memory) -> None:
        """Forget the tiles of older copies, which nobody needs any more. Not collective."""
        memory.shares = {
            name: one for name, one in memory.shares.items() if name == self.name
        }


def number_of(name: str) -> int:
    """Return the number in the name of a copy; 0 for one without tiles. Not collective."""
    return int(name.partition("-")[0] or 0)


def copy_tiles(
    comm: Communicator,
    memory: Memory,
    captured: Sequence[CapturedState],
    tiles: Sequence[CapturedTiles],
    survey: TileSurvey,
) -> RememberedTiles:
    """Copy the tiles that each rank would write into its memory, and another rank's.

    Collective. Main thread only. The tiles of the last copy stay, so that a rank that is
    lost meanwhile leaves one whole copy or the other. If only root is to hold copies, each
    rank still keeps its own tiles: root could not hold all.

    Args:
        comm: The communicator.
        memory: The memory, of the same kind on every rank.
        captured: The contents of this rank.
        tiles: The tiles that it writes in a save.
        survey: How the cut leaves lie on the ranks.

    Raises:
        StageError: On every rank, if any rank cannot copy a tile, or lacks the memory.
    """
    # Besides those of the last copy there may be tiles of one that was never completed.
    memory.shares = dict(list(memory.shares.items())[:1])
    last = memory.copy

    def head() -> list[object]:
        assert survey.joined is not None
        structures = {one.name: one.structure for one in captured}
        states = {
            name: [structures[name], [leaf.spec.to_json() for leaf in leaves]]
            for name, leaves in survey.joined.leaves.items()
        }
        number = 1 + (0 if last is None else last.number)
        return [f"{number}-{os.urandom(8).hex()}", states]

    name, states = on_root(comm, _DOING, head, error=StageError)
    own = agree(comm, _DOING, lambda: _pack(comm.rank, tiles), error=StageError)
    shares = [own]
    if comm.size > 1 and memory.holders == "all":
        shares.append(_exchange(comm, own))
    memory.shares[name] = tuple(shares)
    # From here on each rank knows that all tiles of this copy are on two ranks.
    agree(comm, _DOING, lambda: None, error=StageError)
    contents = {
        state: CutContents(structure, tuple([as_leaf_spec(*spec) for spec in specs]))
        for state, (structure, specs) in states.items()
    }
    return RememberedTiles(name, contents)


def _pack(rank: int, tiles: Sequence[CapturedTiles]) -> TileShare:
    """Copy this rank's tiles. Not collective."""
    entries = [entry for one in tiles for entry in one.entries]
    leaves = [(one, leaf) for one in tiles for leaf in one.leaves]
    lengths = [round_up(entry.nbytes, _ALIGNMENT) for entry in entries]
    *places, end = accumulate(lengths, initial=0)
    data = np.empty(end, np.uint8).data
    for (one, leaf), first in zip(leaves, places, strict=True):
        with about_leaf(one, leaf):
            leaf.buffer.copy_to(data[first : first + leaf.spec.nbytes])
    table = [
        [entry.state, entry.spec.name, *entry.box, first]
        for entry, first in zip(entries, places, strict=True)
    ]
    return TileShare(rank, json.dumps(table).encode(), data)


def _exchange(comm: Communicator, own: TileShare) -> TileShare:
    """Give this rank's share to the next one; return that of the one before."""
    before, after = _neighbours(comm)
    lengths = np.array([before, 0, 0], np.int64)
    mine = np.array([comm.rank, len(own.table), len(own.data)], np.int64)
    _swap(comm, (after, mine), (before, lengths))

    def room() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return np.empty(int(lengths[1]), np.uint8), np.empty(int(lengths[2]), np.uint8)

    table, data = agree(comm, _DOING, room, error=StageError)
    _swap(comm, (after, np.frombuffer(own.table, np.uint8)), (before, table))
    _swap(comm, (after, np.frombuffer(own.data, np.uint8)), (before, data))
    return TileShare(int(lengths[0]), table.tobytes(), data.data)


def _swap(
    comm: Communicator,
    sent: tuple[int, NDArray[np.generic]],
    received: tuple[int, NDArray[np.generic]],
) -> None:
    sends = [(sent[0], sent[1].view(np.uint8))]
    exchange_messages(comm, sends, [(received[0], received[1].view(np.uint8))], _DOING)


def _neighbours(comm: Communicator) -> tuple[int, int]:
    """Return the ranks before and after this one, on other hosts if there are any.

    The first ranks of all hosts come first, then the second ones, and so on.
    """
    node_of = comm.topology.node_of
    order = np.argsort(node_of, kind="stable")
    starts = np.searchsorted(node_of[order], node_of[order])
    nth = np.empty(comm.size, np.int64)
    nth[order] = np.arange(comm.size) - starts
    ring = np.lexsort((node_of, nth)).tolist()
    at = ring.index(comm.rank)
    return ring[at - 1], ring[(at + 1) % comm.size]
