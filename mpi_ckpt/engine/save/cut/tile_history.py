# SPDX-License-Identifier: Apache-2.0
"""Finds tiles that a rank has written before, and that have not changed since. No MPI.

A rank remembers what it has written in this run. The tiles of a state are shared with the
newest generation as a whole, by a hard link, or written again: a list of tiles in a file
cannot say that some of a state's tiles no longer count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpi_ckpt.engine.sync.captured import about_leaf
from mpi_ckpt.leaves.digest import BLOCK_BYTES, BlockHasher
from mpi_ckpt.storage.format.layout import carried_file_name, generation_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mpi_ckpt.engine.save.cut.own_tiles import CapturedTiles
    from mpi_ckpt.leaves.digest import Digest
    from mpi_ckpt.leaves.leaf import Leaf
    from mpi_ckpt.storage.format.manifest import StoredFile
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
