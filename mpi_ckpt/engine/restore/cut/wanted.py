# SPDX-License-Identifier: Apache-2.0
"""Joins what each rank wants of leaves that are cut, in the files or in the program.

A leaf that was saved whole and is whole in the program is broadcast (`transfer`). Every
other leaf is traded (`trading`): each rank receives the boxes that it wants. No MPI.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.decomposition.fragments import SavedTiles, WantedTiles
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.storage.format.manifest import StoredTile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.engine.outline import StateOutline
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, TileBuffer
    from mpi_ckpt.storage.reading.reader import GenerationReader

_ABSENT, _ELSEWHERE, _WHOLE, _CUT = "-?wc"


class LeafIndex(NamedTuple):
    """A saved leaf: the number of its state in the match, and its number in the state."""

    state: int
    leaf: int


def encode_wants(match: StateMatch) -> bytes:
    """Return what this rank wants of each leaf. Not collective. Thread-safe.

    Args:
        match: The states to restore, the same on every rank but for their destinations.
    """
    wants = []
    for matched in match.states:
        is_whole = matched.saved.is_stream or matched.saved.parts is not None
        saved, leaves = matched.saved.leaves, matched.arrival.leaves
        if is_whole:
            saved, leaves = (), ()
        unexpected = set(matched.arrival.unexpected)
        codes = "".join(
            [
                _code(leaf, is_told=spec.name in unexpected)
                for spec, leaf in zip(saved, leaves, strict=True)
            ]
        )
        boxes = [
            [tile.box for tile in leaf.tiles]
            for leaf in leaves
            if leaf is not None and leaf.tiles is not None
        ]
        wants.append([codes, boxes])
    return json.dumps(wants).encode()


def _code(leaf: Leaf | None, *, is_told: bool) -> str:
    if leaf is None:
        return _ABSENT if is_told else _ELSEWHERE
    return _WHOLE if leaf.tiles is None else _CUT


@dataclass(frozen=True, slots=True)
class Wants:
    """What the ranks want of the leaves that are traded, joined by root.

    Attributes:
        leaves: The traded leaves.
        saved: Their saved tiles.
        wanted: The tiles that the ranks want.
        itemsizes: Bytes of an element of each leaf, int64.
        files: Names of the files with the saved tiles, by their numbers.
        stored: The saved tiles, in the order of ``saved``.
        unwanted: State -> names of its leaves that no rank wants, though some might.
    """

    leaves: tuple[LeafIndex, ...]
    saved: SavedTiles
    wanted: WantedTiles
    itemsizes: NDArray[np.int64]
    files: tuple[str, ...]
    stored: tuple[StoredTile, ...]
    unwanted: Mapping[str, tuple[str, ...]]


def join_wants(
    states: Sequence[StateOutline],
    encoded: Sequence[bytes],
    stored_tiles: Callable[[Sequence[LeafIndex]], list[tuple[int, StoredTile]]],
) -> Wants:
    """Join what all ranks want. Not collective. On root.

    Args:
        states: The saved contents of the states to restore.
        encoded: What `encode_wants` returned on each rank, in rank order.
        stored_tiles: Returns the saved tiles of some leaves, each with the number of its
            leaf among them. Its errors pass.
    """
    wants = [json.loads(one) for one in encoded]
    traded, unwanted = _traded(states, [[codes for codes, _ in one] for one in wants])
    numbers = {index: number for number, index in enumerate(traded)}
    specs = [states[index.state].leaves[index.leaf] for index in traded]
    wanted: list[tuple[int, int, int, Box]] = []
    for rank, of_rank in enumerate(wants):
        tiles = _tiles_wanted(states, of_rank, numbers)
        for at, (leaf, box) in enumerate(tiles):
            wanted.append((leaf, rank, at, box))
    stored = stored_tiles(traded)
    return join_tiles(traded, specs, stored, wanted, unwanted)


def join_tiles(
    leaves: Sequence[LeafIndex],
    specs: Sequence[LeafSpec],
    stored: Sequence[tuple[int, StoredTile]],
    wanted: Sequence[tuple[int, int, int, Box]],
    unwanted: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Wants:
    """Put saved and wanted tiles into tables. Not collective. Thread-safe.

    Args:
        leaves: The leaves.
        specs: Their specs.
        stored: Number of a leaf in these, and a saved tile of it.
        wanted: Number of a leaf, the rank that wants a tile of it, the number of the tile
            on that rank, and its box.
        unwanted: As that of `Wants`.
    """
    files = sorted({tile.leaf.extent.file for _, tile in stored})
    places = {name: number for number, name in enumerate(files)}
    saved = [
        (
            leaf,
            places[tile.leaf.extent.file],
            tile.leaf.extent.offset,
            tile.box,
        )
        for leaf, tile in stored
    ]
    return Wants(
        leaves=tuple(leaves),
        saved=SavedTiles.of(saved),
        wanted=WantedTiles.of(wanted),
        itemsizes=np.array([dtypes.element_bytes(spec.dtype) for spec in specs], np.int64),
        files=tuple(files),
        stored=tuple([tile for _, tile in stored]),
        unwanted=unwanted,
    )


def tiles_here(match: StateMatch, traded: Sequence[LeafIndex]) -> list[TradedTile]:
    """Return the tiles that this rank wants, by the numbers that `join_wants` gave them.

    Not collective.
    """
    tiles: list[TradedTile] = []
    for state, at in traded:
        matched = match.states[state]
        leaf = matched.arrival.leaves[at]
        if leaf is None:
            continue
        spec = matched.saved.leaves[at]
        name = f"state {matched.saved.name!r}, leaf {spec.name!r}"
        width = dtypes.element_bytes(spec.dtype)
        if leaf.tiles is None:
            # The states' leaves are arrays or tensors, of which boxes can be taken.
            buffer = cast("TileBuffer", leaf.buffer)
            tiles.append(TradedTile(name, spec.shape, width, buffer))
        else:
            tiles += [
                TradedTile(name, tile.box.shape, width, tile.buffer) for tile in leaf.tiles
            ]
    return tiles


def _traded(
    states: Sequence[StateOutline], codes: Sequence[Sequence[str]]
) -> tuple[list[LeafIndex], dict[str, tuple[str, ...]]]:
    """Return the leaves to trade, and those that no rank wants.

    A leaf that was saved whole counts among these only if a rank has left it to others.
    """
    traded: list[LeafIndex] = []
    unwanted: dict[str, tuple[str, ...]] = {}
    for state, saved in enumerate(states):
        of_ranks = [one[state] for one in codes]
        for at, spec in enumerate(saved.leaves if any(of_ranks) else ()):
            here = {one[at] for one in of_ranks}
            is_cut = at >= len(saved.specs)
            is_nowhere = here <= {_ABSENT, _ELSEWHERE}
            if is_nowhere and (is_cut or _ELSEWHERE in here):
                unwanted[saved.name] = (*unwanted.get(saved.name, ()), spec.name)
            elif is_cut or _CUT in here:
                traded.append(LeafIndex(state, at))
    return traded, unwanted


def _tiles_wanted(
    states: Sequence[StateOutline],
    of_rank: Sequence[tuple[str, list[list[list[list[int]]]]]],
    numbers: Mapping[LeafIndex, int],
) -> list[tuple[int, Box]]:
    """Return the tiles that one rank wants, in the order of `tiles_here`."""
    tiles: list[tuple[int, Box]] = []
    for state, (codes, boxes) in enumerate(of_rank):
        of_leaves = iter(boxes)
        for at, code in enumerate(codes):
            cut = next(of_leaves) if code == _CUT else ()
            number = numbers.get(LeafIndex(state, at))
            if number is None:
                continue
            if code == _WHOLE:
                tiles.append((number, Box.whole(states[state].leaves[at].shape)))
            tiles += [(number, Box(tuple(o), tuple(n))) for o, n in cut]
    return tiles


def tiles_of_files(
    reader: GenerationReader, states: Sequence[StateOutline], traded: Sequence[LeafIndex]
) -> list[tuple[int, StoredTile]]:
    """Return the tiles of some leaves in a generation. Not collective. On root.

    Args:
        reader: The open generation.
        states: The saved contents of the states to restore.
        traded: The leaves.

    Returns:
        Each with the number of its leaf in ``traded``.

    Raises:
        CorruptGenerationError: On the calling rank, if a list of tiles is damaged.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    stored: list[tuple[int, StoredTile]] = []
    for number, (state, at) in enumerate(traded):
        saved = states[state]
        if at >= len(saved.specs):
            of_leaf = reader.tiles()[saved.name, saved.leaves[at].name]
            stored += [(number, tile) for tile in of_leaf]
        else:
            there = reader.manifest.state(saved.name)
            assert there is not None
            leaf = there.leaves[at]
            stored.append((number, StoredTile(Box.whole(leaf.spec.shape), leaf)))
    return stored


class TradedTile(NamedTuple):
    """A tile that this rank receives.

    Attributes:
        name: Names its state and leaf, for errors.
        shape: Its shape.
        itemsize: Bytes of an element.
        buffer: Its memory.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    buffer: TileBuffer
