# SPDX-License-Identifier: Apache-2.0
"""Opens a generation and returns its bytes, each block only after it is proven."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from mpi_ckpt.errors import UnsupportedFormatError
from mpi_ckpt.leaves.digest import BlockHasher
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.format import manifest_codec
from mpi_ckpt.storage.format.layout import MANIFEST, generation_number
from mpi_ckpt.storage.format.tensorfile import HEADER_BYTES_MAX
from mpi_ckpt.storage.reading.file_reader import (
    FileReader,
    corrupt_unless_readable,
    prove_header,
    require_size,
)
from mpi_ckpt.storage.reading.tile_index import TileIndex

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mpi_ckpt.storage.format.manifest import (
        Manifest,
        StoredFile,
        StoredLeaf,
        StoredTile,
    )
    from mpi_ckpt.storage.reading.tile_index import LeafKey

_HEADER_PIECE_BYTES = 1 << 20


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a generation.

    Not collective. Thread-safe.

    Args:
        path: Directory of the generation. If its name is that of a generation, it must not
            be a link, and the manifest must carry the same number.

    Raises:
        CorruptGenerationError: On the calling rank, if it is missing or damaged.
        UnsupportedFormatError: On the calling rank, if it has another version.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    where = path / MANIFEST
    number = generation_number(path.name)
    with corrupt_unless_readable(where, number):
        if number is not None and path.is_symlink():
            raise ValueError("its directory is a link; put the directory itself there")
        with filesystem.open_for_reading(where) as (descriptor, nbytes):
            if nbytes > manifest_codec.MANIFEST_BYTES_MAX:
                raise ValueError(f"{nbytes} bytes are no manifest")
            data = bytearray(nbytes)
            with memoryview(data) as into:
                count = filesystem.read_at(descriptor, into, 0)
            del data[count:]
        try:
            manifest = manifest_codec.decode(data)
        except UnsupportedFormatError as error:
            raise UnsupportedFormatError(
                f"{where}: {error}", path=where, generation=number
            ) from None
        if number is not None and manifest.generation != number:
            raise ValueError(f"it is the manifest of generation {manifest.generation}")
    return manifest


class GenerationReader(FileReader):
    """Reads the files of one generation; a context manager.

    Not collective. Several threads can read its bytes. Files are opened when first read and
    stay open, unless the generation has very many.

    Args:
        path: Directory of the generation.
        manifest: Its manifest, if it was already read.
        tiles_later: Whether the files of tiles are checked later: by `take_headers`, or by
            the first call of `tiles`.

    Attributes:
        manifest: Its manifest.
        absent: Names of its files that are on other hosts; of most generations none.

    Raises:
        CorruptGenerationError: On the calling rank, if a file is missing, of another
            size, or has a damaged header.
        UnsupportedFormatError: On the calling rank, if it has another version.
        ReadError: On the calling rank, if the operating system cannot read it.
    """

    def __init__(
        self, path: Path, manifest: Manifest | None = None, *, tiles_later: bool = False
    ) -> None:
        self.manifest: Manifest = manifest or read_manifest(path)
        super().__init__(path, self.manifest.generation)
        self._lock = Lock()
        self._tiles: Mapping[LeafKey, tuple[StoredTile, ...]] | None = None
        self.absent = self._find_absent()
        self.unproven = TileIndex(self.manifest).files if tiles_later else []
        later = self.absent.union(file.name for file in self.unproven)
        try:
            for file in self.manifest.files:
                if file.name not in later:
                    self._check(file)
        except BaseException:
            self._files.close()
            raise

    def tiles(self) -> Mapping[LeafKey, tuple[StoredTile, ...]]:
        """Return the tiles of each cut leaf, by the names of its state and of the leaf.

        Not collective. Thread-safe. The first call reads and proves the headers of the
        files of tiles. Tiles in files on other hosts are left out.

        Raises:
            CorruptGenerationError: On the calling rank, if a header is damaged, contradicts
                the manifest, or the tiles do not make up the leaves.
            ReadError: On the calling rank, if the operating system cannot read it.
        """
        with self._lock:
            if self._tiles is None:
                index = TileIndex(self.manifest)
                here = [file for file in index.files if self._has_header(file.name)]
                for file in here:
                    header = self.read_header(file)
                    with self._reading(file.name):
                        index.add(file, header)
                is_whole = len(here) == len(index.files)
                self._tiles = self._finish(index) if is_whole else index.found()
            return self._tiles

    def take_headers(self, headers: Mapping[str, bytes]) -> None:
        """Take the tiles from headers that other ranks have read.

        Not collective. Thread-safe.

        Args:
            headers: Name of each file of tiles -> its header.

        Raises:
            CorruptGenerationError: On the calling rank, as `tiles` does.
        """
        with self._lock:
            index = TileIndex(self.manifest)
            for file in index.files:
                with self._reading(file.name):
                    prove_header(file, headers[file.name])
                    index.add(file, headers[file.name])
            self._tiles = self._finish(index)

    def prove_rest(self) -> None:
        """Check the files of tiles whose lists nobody needs.

        Not collective. Errors are those of opening a generation.
        """
        for file in self.unproven:
            self._check(file)
        self.unproven = []

    def _finish(self, index: TileIndex) -> Mapping[LeafKey, tuple[StoredTile, ...]]:
        with corrupt_unless_readable(self.path, self.manifest.generation):
            found = index.finish()
        self.unproven = []
        return found

    def leaves(self) -> list[StoredLeaf]:
        """Return the whole leaves and the tiles of all states. Not collective. Thread-safe.

        Those in files on other hosts are left out. Errors are those of `tiles`.
        """
        tiles = [tile.leaf for found in self.tiles().values() for tile in found]
        every = self.manifest.leaves + tiles
        absent = self.absent
        return [one for one in every if one.extent.file not in absent] if absent else every

    def read_block(self, leaf: StoredLeaf, block: int) -> memoryview:
        """Return one block of a leaf, proven; `proven_blocks` reads many.

        Not collective. Thread-safe.

        Args:
            leaf: A leaf of this generation's manifest.
            block: Index of the block in the leaf.

        Raises:
            CorruptGenerationError: On the calling rank, if its bytes are not those saved.
            ReadError: On the calling rank, if the operating system cannot read it.
        """
        extent, start = leaf.extent, block * self.manifest.block_bytes
        length = max(0, min(extent.nbytes - start, self.manifest.block_bytes))
        into = memoryview(bytearray(length))
        offset = extent.offset + start
        with self._reading(extent.file), self._files.use(extent.file) as found:
            count = filesystem.read_at(found.descriptor, into, offset)
        self._counts.append(count)
        self.expect(extent.file, offset + count, offset + length)
        self.prove(leaf, block, into)
        return into

    def prove(self, leaf: StoredLeaf, block: int, data: memoryview) -> None:
        """Compare the bytes of a block with their saved digest.

        Not collective. Thread-safe.

        Args:
            leaf: A leaf of this generation's manifest.
            block: Index of the block in the leaf.
            data: The bytes read.

        Raises:
            CorruptGenerationError: On the calling rank, if they differ.
        """
        offset = leaf.extent.offset + block * self.manifest.block_bytes
        self.prove_bytes(leaf.extent.file, offset, data, leaf.digest.blocks[block])

    def _prove_header(self, descriptor: int, file: StoredFile) -> None:
        # In pieces: a manifest may claim a header of 100 MB, which is not needed in memory.
        hasher = BlockHasher(HEADER_BYTES_MAX)
        piece = memoryview(bytearray(min(_HEADER_PIECE_BYTES, file.header_bytes)))
        for start in range(0, file.header_bytes, _HEADER_PIECE_BYTES):
            into = piece[: file.header_bytes - start]
            count = filesystem.read_at(descriptor, into, start)
            self._counts.append(count)
            hasher.update(into[:count])
        if hasher.finish().whole != file.header_digest:
            raise ValueError("its header does not match its digest")

    def _has_header(self, name: str) -> bool:
        return name not in self.absent

    def _find_absent(self) -> frozenset[str]:
        # Each host of a local generation has some of its files.
        if self.manifest.local is None:
            return frozenset()
        with self._reading(""):
            there = set(filesystem.list_names(self.path))
        return frozenset(file.name for file in self.manifest.files) - there

    def _check(self, file: StoredFile) -> None:
        with self._reading(file.name), self._files.use(file.name) as found:
            require_size(file, found.nbytes)
            self._prove_header(found.descriptor, file)
