# SPDX-License-Identifier: Apache-2.0
"""Copies the states into the `Memory` of each rank that holds a copy."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree, bcast_bytes, exchange_messages, on_root
from mpi_ckpt.engine.outline import Outline, StateOutline
from mpi_ckpt.engine.save.cut.cut_forms import as_leaf_spec
from mpi_ckpt.engine.save.staging import LateCopies, Staged, StagedStream, stage
from mpi_ckpt.engine.sync.captured import CapturedState, about_leaf, capture_states
from mpi_ckpt.errors import StageError
from mpi_ckpt.leaves.leaf import Form, Leaf, MemoryBuffer
from mpi_ckpt.memory import MemoryCopy, TileShare, round_up
from mpi_ckpt.state import LeafState, PartsState, State
from mpi_ckpt.storage.format.tensorfile import fill_leaves, read_form, write_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.save.cut.own_tiles import CapturedTiles
    from mpi_ckpt.engine.save.cut.survey import TileSurvey
    from mpi_ckpt.engine.save.request import SaveRequest
    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.memory import Memory
    from mpi_ckpt.state import Structure


_COPYING_TILES = "remembering tiles"
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

    name, states = on_root(comm, _COPYING_TILES, head, error=StageError)
    own = agree(comm, _COPYING_TILES, lambda: _pack(comm.rank, tiles), error=StageError)
    shares = [own]
    if comm.size > 1 and memory.holders == "all":
        shares.append(_exchange(comm, own))
    memory.shares[name] = tuple(shares)
    # From here on each rank knows that all tiles of this copy are on two ranks.
    agree(comm, _COPYING_TILES, lambda: None, error=StageError)
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

    table, data = agree(comm, _COPYING_TILES, room, error=StageError)
    _swap(comm, (after, np.frombuffer(own.table, np.uint8)), (before, table))
    _swap(comm, (after, np.frombuffer(own.data, np.uint8)), (before, data))
    return TileShare(int(lengths[0]), table.tobytes(), data.data)


def _swap(
    comm: Communicator,
    sent: tuple[int, NDArray[np.generic]],
    received: tuple[int, NDArray[np.generic]],
) -> None:
    sends = [(sent[0], sent[1].view(np.uint8))]
    exchange_messages(
        comm, sends, [(received[0], received[1].view(np.uint8))], _COPYING_TILES
    )


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


_DOING = "remembering the states"
_NO_TILES = RememberedTiles()


@without_collections()
def copy_into(
    memory: Memory,
    comm: Communicator,
    request: SaveRequest,
    threads: int,
    *,
    late: bool,
    tiles: RememberedTiles = _NO_TILES,
) -> Staged | None:
    """Copy the contents of a save into the memory, on the ranks that hold a copy.

    Collective. Main thread only. No save is being written from the memory. If a rank is
    killed meanwhile, each other rank still has a whole copy: the previous one or this one.

    Args:
        memory: The memory, of the same kind on every rank.
        comm: The communicator.
        request: All contents of a save.
        threads: Threads that copy.
        late: Whether root may leave the copies of leaves behind a gate to the thread that
            writes the save.
        tiles: The copies of their tiles, which all ranks have made already.

    Returns:
        The copies, on ranks that hold one; None elsewhere.

    Raises:
        StageError: On every rank, if any rank cannot copy a state, or lacks the memory for
            it.
    """
    # All meetings of the ranks come first: only a copy follows, which no other rank can
    # block.
    from_root = _send_from_root(comm, memory, request.states)

    def keep() -> Staged | None:
        if not comm.is_root and memory.holders == "root":
            tiles.keep(memory)
            return None
        memory.copy = None
        taken = list(_take_here(comm, request.states, from_root))
        staged = stage(memory.arena, taken, threads=threads)
        staged.late.when_copied(lambda: _hold(memory, request, staged, tiles))
        if staged.late and not (late and comm.is_root):
            staged.late.copy()
            staged = replace(staged, late=LateCopies())
        return staged

    return agree(comm, _DOING, keep, error=StageError)


def _send_from_root(
    comm: Communicator, memory: Memory, states: Sequence[CapturedState | State]
) -> Mapping[str, bytes]:
    """Send all ranks what only root knows: state name -> bytes. Collective."""
    if comm.size == 1 or memory.holders == "root":
        return {}
    theirs = [content for content in states if _is_roots(content)]
    encoded: list[bytes] = []

    def encode() -> None:
        encoded.extend(_encode(content) for content in theirs)

    on_root(comm, _DOING, encode, error=StageError)
    return {
        content.name: bcast_bytes(comm, encoded[number] if encoded else None, _DOING)
        for number, content in enumerate(theirs)
    }


def _is_roots(content: CapturedState | State) -> bool:
    """Return whether only root knows the contents of a state that a save would write."""
    state = _state_of(content)
    if not isinstance(state, LeafState) or isinstance(state, PartsState):
        return True
    return state.sync_mode == "none"


def _state_of(content: CapturedState | State) -> State:
    return content.state if isinstance(content, CapturedState) else content


def _encode(content: CapturedState | State) -> bytes:
    stream = io.BytesIO()
    if isinstance(content, CapturedState):
        write_leaves(stream, content.structure, content.leaves)
    else:
        content.save(stream)
    return stream.getvalue()


def _take_here(
    comm: Communicator,
    states: Sequence[CapturedState | State],
    from_root: Mapping[str, bytes],
) -> Iterator[CapturedState | State]:
    for content in states:
        state = _state_of(content)
        if comm.is_root and isinstance(content, CapturedState):
            yield content
        elif isinstance(state, LeafState) and state.name in from_root:
            yield _decode(state, from_root[state.name])
        elif isinstance(state, LeafState):
            # Capture again: a sync stored bytes after it had captured. Digests that no
            # longer match belong to a state that only root writes.
            (mine,) = capture_states([state])
            known = content.digests if isinstance(content, CapturedState) else None
            yield replace(mine, digests=known)
        elif state.name in from_root:
            yield StagedStream(state.name, memoryview(from_root[state.name]))
        else:
            yield state


def _decode(state: LeafState, data: bytes) -> CapturedState:
    stream = io.BytesIO(data)
    structure, specs = read_form(stream)
    leaves = [Leaf(spec, MemoryBuffer.empty(spec.nbytes)) for spec in specs]
    fill_leaves(stream, specs, leaves)
    return CapturedState(state, structure, tuple(leaves), Form(specs))


def _hold(
    memory: Memory, request: SaveRequest, staged: Staged, tiles: RememberedTiles
) -> None:
    outline = Outline(
        step=request.step,
        size=request.size,
        metrics=dict(request.metrics),
        states=tuple(_outline_of(content, tiles) for content in staged.states),
        copy=tiles.name,
    )
    leaves = {
        content.name: [leaf.buffer.read() for leaf in _leaves_of(content)]
        for content in staged.states
    }
    text = json.dumps(outline.to_json()).encode()
    memory.copy = MemoryCopy(request.step, text, leaves, number_of(tiles.name))
    tiles.keep(memory)


def _outline_of(content: CapturedState | State, tiles: RememberedTiles) -> StateOutline:
    if not isinstance(content, CapturedState):
        return StateOutline.of_stream(content.name, _leaves_of(content)[0].spec.nbytes)
    known = tiles.states.get(content.name)
    if known is None:
        return StateOutline(content.name, content.structure, content.form)
    # The structure of root, as in a file: those of other ranks may be others.
    return StateOutline(content.name, known.structure, content.form, cut=known.cut)


def _leaves_of(content: CapturedState | State) -> Sequence[Leaf]:
    if isinstance(content, CapturedState):
        return content.leaves
    assert isinstance(content, StagedStream)
    return [content.leaf()]
