# SPDX-License-Identifier: Apache-2.0
"""Finds the tiles of each cut leaf in the headers of a generation's files. Pure.

A file may hold tiles of states that no longer name it. Those are dead bytes, as leaves are
that no manifest names.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from mpi_ckpt.decomposition import tiling
from mpi_ckpt.storage.format.strict_json import shown
from mpi_ckpt.storage.format.tile_table import decode_tile_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.storage.format.manifest import Manifest, StoredFile, StoredTile

LeafKey = tuple[str, str]
"""Name of a state, and name of a leaf in it."""

# A search for a hole counts elements in 64 bits.
_SEARCHED_ELEMENTS_MAX = 1 << 62


class TileIndex:
    """Collects the tiles of a generation, file by file. Not collective.

    Args:
        manifest: The generation's manifest.

    Attributes:
        files: The files that hold tiles, each to be given to `add` once.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._block_bytes = manifest.block_bytes
        self._states = {state.name: state for state in manifest.states}
        self._tiles: dict[LeafKey, list[StoredTile]] = {
            (state.name, leaf.spec.name): []
            for state in manifest.states
            for leaf in state.cut
        }
        self._specs = {
            (state.name, leaf.spec.name): leaf.spec
            for state in manifest.states
            for leaf in state.cut
        }
        named = {name for state in manifest.states for name in state.files}
        self.files = [file for file in manifest.files if file.name in named]

    def add(self, file: StoredFile, header: bytes) -> None:
        """Take the tiles of one file. Not collective.

        Raises:
            ValueError: On the calling rank, if its table breaks a rule of the format, or
                contradicts the manifest.
        """
        for name, spec, tile in decode_tile_header(header, file, self._block_bytes):
            state = self._states.get(name)
            if state is None or file.name not in state.files:
                continue
            key = (name, spec.name)
            expected = self._specs.get(key)
            if spec != expected:
                listed = shown(str(expected)) if expected else "no such cut leaf"
                raise ValueError(
                    f"{_words(key)}, tile {tile.box}: the table has {shown(str(spec))}, "
                    f"the manifest {listed}"
                )
            self._tiles[key].append(tile)

    def finish(self) -> dict[LeafKey, tuple[StoredTile, ...]]:
        """Return the tiles of each cut leaf, once all files are added. Not collective.

        Raises:
            ValueError: On the calling rank, if the tiles of a leaf are not as many as the
                manifest lists, or do not make up the leaf.
        """
        for state in self._states.values():
            for leaf in state.cut:
                key = (state.name, leaf.spec.name)
                found = self._tiles[key]
                if len(found) != leaf.tiles:
                    raise ValueError(
                        f"{_words(key)}: the files have {len(found)} tiles of it, the "
                        f"manifest lists {leaf.tiles}"
                    )
                problem = _fault(leaf.spec, found)
                if problem:
                    raise ValueError(f"{_words(key)}: {problem}")
        return self.found()

    def found(self) -> dict[LeafKey, tuple[StoredTile, ...]]:
        """Return the tiles of the files that were added; others are on other hosts.

        Not collective.
        """
        return {key: tuple(tiles) for key, tiles in self._tiles.items()}


def _words(key: LeafKey) -> str:
    return f"state {shown(key[0])}, leaf {shown(key[1])}"


def _fault(spec: LeafSpec, tiles: Sequence[StoredTile]) -> str | None:
    """Return why tiles do not make up a leaf."""
    seen: dict[object, StoredTile] = {}
    for tile in tiles:
        other = seen.setdefault(tile.box, tile)
        if other is not tile:
            first, second = other.leaf.extent.file, tile.leaf.extent.file
            return f"tile {tile.box} is in {first} and {second}"
    held, size = sum(tile.box.size for tile in tiles), prod(spec.shape)
    if held != size and size > _SEARCHED_ELEMENTS_MAX:
        return f"its tiles have {held} elements, the leaf has {shown(size)}"
    found = tiling.fault(spec.shape, [tile.box for tile in tiles])
    if found is None:
        return None
    files = sorted({tiles[place].leaf.extent.file for place in found.boxes})
    return f"{found.text}{' in ' if files else ''}{' and '.join(files)}"
