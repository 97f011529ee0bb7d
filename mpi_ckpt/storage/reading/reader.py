# SPDX-License-Identifier: Apache-2.0
"""Opens a generation and returns its bytes, each block only after it is proven."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

from mpi_ckpt.digest import BlockHasher, digest_bytes
from mpi_ckpt.errors import CorruptGenerationError, ReadError, UnsupportedFormatError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.format import manifest_codec
from mpi_ckpt.storage.format.layout import MANIFEST, generation_number
from mpi_ckpt.storage.format.tensorfile import HEADER_BYTES_MAX
from mpi_ckpt.storage.format.tile_table import TABLE_BYTES_MAX
from mpi_ckpt.storage.reading.open_files import OpenFiles
from mpi_ckpt.storage.reading.tile_index import TileIndex

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

    from mpi_ckpt.storage.format.manifest import (
        Manifest,
        StoredFile,
        StoredLeaf,
        StoredTile,
    )
    from mpi_ckpt.storage.reading.tile_index import LeafKey

# Errors of open that mean a damaged generation, rather than an unreachable one.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO)
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
    with _corrupt_unless_readable(where, number):
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


class GenerationReader:
    """Reads the files of one generation; a context manager.

    Not collective. Several threads can read its bytes. Files are opened when first read and
    stay open, unless the generation has very many.

    Args:
        path: Directory of the generation.

    Raises:
        CorruptGenerationError: On the calling rank, if a file is missing, of another
            size, or has a damaged header.
        UnsupportedFormatError: On the calling rank, if it has another version.
        ReadError: On the calling rank, if the operating system cannot read it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        # Threads append; concurrent additions to a number would lose some.
        self._counts: list[int] = []
        self._files = OpenFiles(path)
        self._lock = Lock()
        self._tiles: Mapping[LeafKey, tuple[StoredTile, ...]] | None = None
        try:
            for file in self.manifest.files:
                self._check(file)
        except BaseException:
            self._files.close()
            raise

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return sum(self._counts)

    def close(self) -> None:
        """Close the files. Callable twice."""
        self._files.close()

    def __enter__(self) -> GenerationReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def tiles(self) -> Mapping[LeafKey, tuple[StoredTile, ...]]:
        """Return the tiles of each cut leaf, by the names of its state and of the leaf.

        Not collective. Thread-safe. The first call reads and proves the headers of the
        files of tiles.

        Raises:
            CorruptGenerationError: On the calling rank, if a header is damaged, contradicts
                the manifest, or the tiles do not make up the leaves.
            ReadError: On the calling rank, if the operating system cannot read it.
        """
        with self._lock:
            if self._tiles is None:
                index = TileIndex(self.manifest)
                for file in index.files:
                    with self._reading(file.name):
                        index.add(file, self._read_header(file))
                with _corrupt_unless_readable(self.path, self.manifest.generation):
                    self._tiles = index.finish()
            return self._tiles

    def leaves(self) -> list[StoredLeaf]:
        """Return the whole leaves and the tiles of all states. Not collective. Thread-safe.

        Errors are those of `tiles`.
        """
        tiles = [tile.leaf for found in self.tiles().values() for tile in found]
        return self.manifest.leaves + tiles

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

    def read_direct(self, file: str, into: memoryview, offset: int) -> int:
        """Read directly, bypassing the page cache if possible, else through it.

        Not collective. Thread-safe.

        Args:
            file: Name of a file of the manifest.
            into: Buffer aligned to 4096 bytes, its length a multiple of that.
            offset: A multiple of 4096.

        Returns:
            Bytes read; fewer than requested only at the end of the file.

        Raises:
            ReadError: On the calling rank, if the operating system cannot read them.
        """
        with self._reading(file):
            try:
                with self._files.use(file, direct=True) as found:
                    count = filesystem.read_at(found.descriptor, into, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Opened for direct reads, but a read fails: the file system needs another
                # alignment, or (Lustre) alignment of the read at the end too.
                with self._files.use(file) as found:
                    count = filesystem.read_at(found.descriptor, into, offset)
        self._counts.append(count)
        return count

    def expect(self, file: str, found: int, needed: int) -> None:
        """Require that a read returned as many bytes as needed. Not collective.

        Raises:
            CorruptGenerationError: On the calling rank, if the file ends too early.
        """
        if found < needed:
            raise CorruptGenerationError(
                f"{self.path / file} ends at {found}, bytes up to {needed} are listed",
                path=self.path / file,
                generation=self.manifest.generation,
            )

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
        expected, found = leaf.digest.blocks[block], digest_bytes(data)
        if found != expected:
            where = self.path / leaf.extent.file
            offset = leaf.extent.offset + block * self.manifest.block_bytes
            raise CorruptGenerationError(
                f"{where}: bytes {offset} to {offset + len(data)} have digest "
                f"{found.hex()}, expected {expected.hex()}",
                path=where,
                generation=self.manifest.generation,
            )

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

    def _read_header(self, file: StoredFile) -> bytes:
        if file.header_bytes > TABLE_BYTES_MAX:
            raise ValueError(f"{file.header_bytes} bytes are no header of tiles")
        header = bytearray(file.header_bytes)
        with self._files.use(file.name) as found, memoryview(header) as into:
            self._counts.append(filesystem.read_at(found.descriptor, into, 0))
        # It may have changed since the generation was opened.
        if digest_bytes(header) != file.header_digest:
            raise ValueError("its header does not match its digest")
        return bytes(header)

    def _check(self, file: StoredFile) -> None:
        with self._reading(file.name), self._files.use(file.name) as found:
            if found.nbytes != file.nbytes:
                raise ValueError(f"has {found.nbytes} bytes, expected {file.nbytes}")
            self._prove_header(found.descriptor, file)

    def _reading(self, name: str) -> AbstractContextManager[None]:
        return _corrupt_unless_readable(self.path / name, self.manifest.generation)


def _is_listed(where: Path, code: int) -> bool:
    """Return whether a listing shows a file that open did not find: it may exist."""
    if code != errno.ENOENT:
        return False
    try:
        return where.name in filesystem.list_names(where.parent)
    except OSError:
        return where.parent.is_dir()  # it exists, but cannot be listed


@contextmanager
def _corrupt_unless_readable(where: Path, generation: int | None) -> Iterator[None]:
    try:
        with os_errors_as(ReadError, "reading", where):
            yield
    except ReadError as error:
        if error.errno not in _NOT_THERE or _is_listed(where, error.errno):
            raise
        raise CorruptGenerationError(
            f"{error}", path=where, generation=generation
        ) from error
    except ValueError as error:
        raise CorruptGenerationError(
            f"{where}: {error}", path=where, generation=generation
        ) from error
