# SPDX-License-Identifier: Apache-2.0
"""Writes a file of tiles, whose header holds the digests of all bytes behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.leaves.digest import BlockHasher, Digest, digest_bytes
from mpi_ckpt.storage.format.manifest import StoredFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mpi_ckpt.storage.format.tile_table import TileFilePlan
    from mpi_ckpt.storage.writing.partial import Partial


def write_tile_file(
    partial: Partial,
    name: str,
    plan: TileFilePlan,
    tiles: Iterable[Iterable[memoryview]],
    *,
    kept: bool = False,
) -> tuple[StoredFile, list[Digest]]:
    """Write tiles as one durable file, and digest them on their way.

    Not collective.

    Args:
        partial: The generation being written.
        name: Name of the file.
        plan: Its layout.
        tiles: The bytes of each tile, in file order, as runs; each run is used up before
            the next is requested.
        kept: Whether the bytes of all runs stay unchanged until this returns.

    Returns:
        The file, as the manifest lists it, and the digests of the tiles in file order.

    Raises:
        WriteError: On the calling rank; the partial must then be dropped.
    """
    digests: list[Digest] = []
    headers: list[bytes] = []

    def runs() -> Iterator[memoryview]:
        for tile in tiles:
            hasher = BlockHasher(plan.block_bytes)
            # Run by run: otherwise the disk would be idle while a large tile is digested.
            for run in tile:
                hasher.update(run)
                yield run
            digests.append(hasher.finish())

    def header() -> bytes:
        headers.append(plan.encode(digests))
        return headers[0]

    partial.write_headed(name, plan.header_bytes, runs(), header, plan.nbytes, kept=kept)
    digest = digest_bytes(headers[0])
    file = StoredFile(name, plan.nbytes, plan.header_bytes, digest, partial.generation)
    return file, digests
