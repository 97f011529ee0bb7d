# SPDX-License-Identifier: Apache-2.0
"""Writes one rank's tiles into one safetensors file, or finds them unchanged. No MPI."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, cast

from mpi_ckpt.engine.sync.captured import CapturedState, about_leaf
from mpi_ckpt.leaves.buckets import pieces_of
from mpi_ckpt.leaves.digest import BLOCK_BYTES, BlockHasher, split_blocks
from mpi_ckpt.storage.format.layout import (
    carried_file_name,
    generation_name,
    tile_file_name,
)
from mpi_ckpt.storage.format.manifest import StoredFile
from mpi_ckpt.storage.format.tile_table import TileEntry, TileFilePlan, plan_tile_file
from mpi_ckpt.storage.writing.outfile import write_tile_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mpi_ckpt.leaves.digest import Digest
    from mpi_ckpt.leaves.leaf import Leaf, TileBuffer
    from mpi_ckpt.storage.format.manifest import CutLeaf
    from mpi_ckpt.storage.format.tile_table import TileEntry
    from mpi_ckpt.storage.writing.partial import Partial

    Runs = Callable[[Leaf], Iterator[memoryview]]


# If less than this share of a file's data is still in use, the file is no longer shared.
_LIVE_SHARE_MIN = 0.5


@dataclass(frozen=True, slots=True)
class WrittenTiles:
    """The tiles of a state in a file that this rank has written.

    Attributes:
        file: The file, under its name in the generation that was saved last.
        entries: The places of the tiles in their leaves.
        digests: Their digests.
    """

    file: StoredFile
    entries: tuple[TileEntry, ...]
    digests: tuple[Digest, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tiles."""
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class TileHistory:
    """The tiles that this rank has in the generation that was saved last.

    Attributes:
        generation: Its number; 0 for none.
        states: State -> its tiles.
    """

    generation: int
    states: Mapping[str, WrittenTiles]

    def share_unchanged(
        self,
        root: Path,
        partial: Partial,
        captured: Mapping[str, Sequence[CapturedTiles]],
        runs_of: Runs,
        full_every: int,
    ) -> dict[str, WrittenTiles]:
        """Share the files of states whose tiles have not changed.

        Not collective.

        Args:
            root: The checkpoint directory.
            partial: The generation being written.
            captured: State -> its tiles now.
            runs_of: Yields the bytes of a tile.
            full_every: Files written so many generations ago, or more, are not shared.

        Returns:
            State -> its tiles in the new generation.

        Raises:
            WriteError: On the calling rank; the partial must then be dropped.
        """
        alike = {
            state: known
            for state, tiles in captured.items()
            if (known := self.states.get(state)) is not None
            and partial.generation - known.file.generation < full_every
            and _entries_of(tiles) == known.entries
        }
        same = {
            state: known
            for state, known in alike.items()
            if _is_unchanged(captured[state], known.digests, runs_of)
        }
        shared: dict[str, WrittenTiles] = {}
        source = root / generation_name(self.generation)
        for file in {known.file.name: known.file for known in same.values()}.values():
            states = [state for state, known in same.items() if known.file == file]
            live = sum(same[state].nbytes for state in states)
            if live < _LIVE_SHARE_MIN * (file.nbytes - file.header_bytes):
                continue
            name = carried_file_name(file.name, file.generation)
            if partial.carry(source / file.name, name, copy=False):
                carried = replace(file, name=name)
                shared |= {state: replace(same[state], file=carried) for state in states}
        return shared


def _entries_of(tiles: Sequence[CapturedTiles]) -> tuple[TileEntry, ...]:
    return tuple([entry for captured in tiles for entry in captured.entries])


def _is_unchanged(
    tiles: Sequence[CapturedTiles], digests: Sequence[Digest], runs_of: Runs
) -> bool:
    """Compare tiles with digests, up to the first block that differs."""
    leaves = [(captured, leaf) for captured in tiles for leaf in captured.leaves]
    for (captured, leaf), digest in zip(leaves, digests, strict=True):
        hasher, known = BlockHasher(BLOCK_BYTES), digest.blocks
        with about_leaf(captured, leaf):
            for run in runs_of(leaf):
                hasher.update(run)
                if not hasher.starts(known):
                    return False
        if hasher.finish().blocks != known:
            return False
    return True


# Tiles that are not contiguous are copied to be written, so many bytes at a time.
_COPIED_BYTES = 4 << 20
# Of others a piece at a time, which is still in the cache when it is copied for the disk.
_CACHED_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class CapturedTiles(CapturedState):
    """Tiles of a state that this rank writes: its ``leaves`` are the tiles.

    Attributes:
        entries: For each of them, its place in the whole leaf.
    """

    entries: tuple[TileEntry, ...] = ()


class Carried(Protocol):
    """Tiles that other ranks hand over while they are written."""

    entries: list[TileEntry]

    def runs(self, index: int) -> Iterator[memoryview]:
        """Yield the bytes of a tile, once those before it of its rank were taken."""


@dataclass(frozen=True, slots=True)
class OwnTiles:
    """The files with tiles that a rank gives to a generation.

    Attributes:
        states: State -> the rank's tiles of it, and their file.
    """

    states: Mapping[str, WrittenTiles]

    def encode(self, generation: int) -> bytes:
        """Return what root must know. Not collective. Thread-safe.

        Args:
            generation: The generation being written.
        """
        files = {written.file.name: written.file for written in self.states.values()}
        reused = [
            one.nbytes for one in self.states.values() if one.file.generation < generation
        ]
        return json.dumps(
            [
                [
                    *(file.name, file.nbytes, file.header_bytes),
                    *(file.header_digest.hex(), file.generation),
                    [state for state, one in self.states.items() if one.file == file],
                ]
                for file in files.values()
            ]
            + [[sum(reused)]]
        ).encode()


def write_own_tiles(
    partial: Partial,
    captured: Mapping[str, Sequence[CapturedTiles]],
    rank: int,
    carried: Carried | None = None,
    *,
    kept: bool = False,
) -> dict[str, WrittenTiles]:
    """Write the tiles of some states to one durable file, if there are any.

    Not collective. No tile is copied whole, though one with ghost cells around it is not
    contiguous.

    Args:
        partial: The generation being written.
        captured: State -> the tiles of it that this rank writes.
        rank: This rank.
        carried: The tiles of other ranks that this rank writes as well.
        kept: Whether nothing changes the tiles until this returns; without ``carried``.

    Returns:
        State -> its tiles in the file.

    Raises:
        SaveError: On the calling rank.
    """
    tiles = [
        (one, number)
        for of_state in captured.values()
        for one in of_state
        for number in range(len(one.leaves))
    ]
    entries = [one.entries[number] for one, number in tiles]
    entries += carried.entries if carried else []
    if not entries:
        return {}
    plan = _plan_of(tuple(entries))

    def runs(index: int) -> Iterator[memoryview]:
        if index >= len(tiles):
            assert carried is not None
            yield from carried.runs(index - len(tiles))
            return
        one, number = tiles[index]
        try:
            yield from runs_of(one.leaves[number])
        except Exception:
            with about_leaf(one, one.leaves[number]):
                raise

    name = tile_file_name(rank)
    tile_runs = map(runs, plan.order)
    file, in_file_order = write_tile_file(partial, name, plan, tile_runs, kept=kept)
    digests = dict(zip(plan.order, in_file_order, strict=True))
    numbers: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        numbers.setdefault(entry.state, []).append(number)
    return {
        state: WrittenTiles(
            file,
            tuple([entries[number] for number in of_state]),
            tuple([digests[number] for number in of_state]),
        )
        for state, of_state in numbers.items()
    }


@dataclass(frozen=True, slots=True)
class TileFiles:
    """The files of tiles of a generation, on root.

    Attributes:
        all: The files of all ranks.
        names: State -> names of the files with tiles of it.
        leaves: State -> its cut leaves.
        theirs: Bytes that other ranks than root have written.
        reused: Bytes of tiles that are shared with older generations.
    """

    all: tuple[StoredFile, ...]
    names: Mapping[str, tuple[str, ...]]
    leaves: Mapping[str, tuple[CutLeaf, ...]]
    theirs: int
    reused: int

    @classmethod
    def join(
        cls,
        encoded: Sequence[bytes],
        leaves: Mapping[str, tuple[CutLeaf, ...]],
        generation: int,
    ) -> TileFiles:
        """Join the files of all ranks. Not collective. Thread-safe.

        Args:
            encoded: What `OwnTiles.encode` returned on each rank, in rank order.
            leaves: State -> its cut leaves.
            generation: The generation being written.
        """
        files: list[StoredFile] = []
        names: dict[str, list[str]] = {}
        theirs = reused = 0
        for rank, data in enumerate(encoded):
            *of_rank, (nbytes,) = json.loads(data)
            reused += nbytes
            for name, size, header_bytes, digest, number, states in of_rank:
                file = StoredFile(name, size, header_bytes, bytes.fromhex(digest), number)
                files.append(file)
                theirs += size if rank and number == generation else 0
                for state in states:
                    names.setdefault(state, []).append(name)
        by_state = {state: tuple(of_state) for state, of_state in names.items()}
        return cls(tuple(files), by_state, leaves, theirs, reused)


@lru_cache(maxsize=2)
def _plan_of(entries: tuple[TileEntry, ...]) -> TileFilePlan:
    # The tiles, and so the plan, usually stay the same from save to save.
    return plan_tile_file(entries)


def runs_of(leaf: Leaf) -> Iterator[memoryview]:
    """Yield the bytes of a tile in C order, a copy of some rows at a time if need be.

    Not collective. A run from a device is overwritten once the next one has been asked for.
    """
    buffer, shape, nbytes = leaf.buffer, leaf.spec.shape, leaf.spec.nbytes
    pieces = pieces_of(leaf)
    if pieces is not None:
        for piece in pieces:
            yield from split_blocks(piece, _CACHED_BYTES)
        return
    if nbytes <= _COPIED_BYTES or not shape or buffer.view() is not None:
        yield from split_blocks(buffer.read(), _CACHED_BYTES)
        return
    yield from _copied_runs(cast("TileBuffer", buffer), shape, nbytes, ())


def _copied_runs(
    buffer: TileBuffer, shape: tuple[int, ...], nbytes: int, at: tuple[slice, ...]
) -> Iterator[memoryview]:
    """Yield runs of a box: whole rows of the first dimension of which several fit."""
    rows = shape[len(at)]
    row_bytes = nbytes // rows
    if row_bytes > _COPIED_BYTES and len(at) + 1 < len(shape):
        for row in range(rows):
            inner = (*at, slice(row, row + 1))
            yield from _copied_runs(buffer, shape, row_bytes, inner)
        return
    step = max(1, _COPIED_BYTES // row_bytes)
    rest = (slice(None),) * (len(shape) - len(at) - 1)
    for start in range(0, rows, step):
        yield buffer.part((*at, slice(start, start + step), *rest)).read()
