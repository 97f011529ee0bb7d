# SPDX-License-Identifier: Apache-2.0
"""Writes one rank's tiles of a generation into one safetensors file. No MPI."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from mpi_ckpt.digest import BLOCK_BYTES, split_blocks
from mpi_ckpt.engine.sync.captured import CapturedState, about_leaf
from mpi_ckpt.storage.format.layout import tile_file_name
from mpi_ckpt.storage.format.manifest import StoredFile
from mpi_ckpt.storage.format.tile_table import TileEntry, TileFilePlan, plan_tile_file
from mpi_ckpt.storage.writing.tile_file import write_tile_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpi_ckpt.engine.save.cut_forms import JoinedForms
    from mpi_ckpt.leaf import Leaf, TileBuffer
    from mpi_ckpt.storage.writing.partial import Partial

# Tiles that are not contiguous are copied to be written, so many bytes at a time.
_COPIED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class CapturedTiles(CapturedState):
    """Tiles of a state that this rank writes: its ``leaves`` are the tiles.

    Attributes:
        entries: For each of them, its place in the whole leaf.
    """

    entries: tuple[TileEntry, ...] = ()


def write_own_tiles(
    partial: Partial, captured: Sequence[CapturedTiles], rank: int
) -> StoredFile | None:
    """Write the tiles of some states to one durable file.

    Not collective. No tile is copied whole, though one with ghost cells around it is not
    contiguous.

    Args:
        partial: The generation being written.
        captured: The tiles that this rank writes, by state.
        rank: This rank.

    Returns:
        The file; None if there is no tile to write.

    Raises:
        SaveError: On the calling rank.
    """
    tiles = [(one, n) for one in captured for n in range(len(one.leaves))]
    if not tiles:
        return None
    plan = _plan_of(tuple(entry for one in captured for entry in one.entries))

    def runs_of(index: int) -> Iterator[memoryview]:
        one, number = tiles[index]
        try:
            yield from _runs_of(one.leaves[number])
        except Exception:
            with about_leaf(one, one.leaves[number]):
                raise

    return write_tile_file(partial, tile_file_name(rank), plan, map(runs_of, plan.order))


@dataclass(frozen=True, slots=True)
class TileFiles:
    """The files of tiles of a generation, on root.

    Attributes:
        of_ranks: The file of each rank; None for a rank that has written none.
        joined: How leaves are cut over the ranks.
    """

    of_ranks: tuple[StoredFile | None, ...]
    joined: JoinedForms

    @property
    def all(self) -> list[StoredFile]:
        """The files, by rank."""
        return [file for file in self.of_ranks if file is not None]

    def files_of(self, state: str) -> tuple[str, ...]:
        """Return the names of the files with tiles of a state. Not collective."""
        files = [self.of_ranks[rank] for rank in self.joined.writers.get(state, ())]
        return tuple([file.name for file in files if file is not None])


def encode_file(file: StoredFile | None) -> bytes:
    """Return what root must know of a rank's file. Not collective. Thread-safe."""
    if file is None:
        return b""
    return json.dumps(
        [*astuple(file)[:3], file.header_digest.hex(), file.generation]
    ).encode()


def decode_file(data: bytes) -> StoredFile | None:
    """Return the file that `encode_file` encoded. Not collective. Thread-safe."""
    if not data:
        return None
    name, nbytes, header_bytes, digest, generation = json.loads(data)
    return StoredFile(name, nbytes, header_bytes, bytes.fromhex(digest), generation)


@lru_cache(maxsize=2)
def _plan_of(entries: tuple[TileEntry, ...]) -> TileFilePlan:
    # The tiles, and so the plan, usually stay the same from save to save.
    return plan_tile_file(entries)


def _runs_of(leaf: Leaf) -> Iterator[memoryview]:
    """Yield the bytes of a tile in C order, a copy of some rows at a time if need be."""
    buffer, shape, nbytes = leaf.buffer, leaf.spec.shape, leaf.spec.nbytes
    if nbytes <= _COPIED_BYTES or not shape or buffer.view() is not None:
        yield from split_blocks(buffer.read(), BLOCK_BYTES)
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
