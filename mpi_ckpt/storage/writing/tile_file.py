# SPDX-License-Identifier: Apache-2.0
"""Writes a file of tiles, whose header holds the digests of all bytes behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.digest import Digest, digest_bytes, split_blocks
from mpi_ckpt.storage.format.manifest import StoredFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mpi_ckpt.storage.format.tile_table import TileFilePlan
    from mpi_ckpt.storage.writing.partial import Partial


def write_tile_file(
    partial: Partial, name: str, plan: TileFilePlan, tiles: Iterable[memoryview]
) -> StoredFile:
    """Write tiles as one durable file, and digest them on their way.

    Not collective.

    Args:
        partial: The generation being written.
        name: Name of the file.
        plan: Its layout.
        tiles: The bytes of each tile, in file order; each is used up before the next is
            requested.

    Returns:
        The file, as the manifest lists it.

    Raises:
        WriteError: On the calling rank; the partial must then be dropped.
    """
    digests: list[Digest] = []
    headers: list[bytes] = []

    def runs() -> Iterator[memoryview]:
        for data in tiles:
            blocks = []
            # Block by block: otherwise the disk would be idle while a large tile is
            # digested.
            for block in split_blocks(data, plan.block_bytes):
                blocks.append(digest_bytes(block))
                yield block
            digests.append(Digest(tuple(blocks)))

    def header() -> bytes:
        headers.append(plan.encode(digests))
        return headers[0]

    partial.write_headed(name, plan.header_bytes, runs(), header, plan.nbytes)
    digest = digest_bytes(headers[0])
    return StoredFile(name, plan.nbytes, plan.header_bytes, digest, partial.generation)
