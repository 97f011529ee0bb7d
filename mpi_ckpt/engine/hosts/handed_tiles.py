# SPDX-License-Identifier: Apache-2.0
"""Hands the tiles of a host's ranks to its leader, as one stream of bytes of each rank.

Whatever fails, a rank sends as many bytes as it has announced, and raises at the next
meeting. The leader holds a piece of each rank, all of them together as long as a piece
that it passes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import exchange_messages
from mpi_ckpt.engine.save.cut.cut_forms import handing_order
from mpi_ckpt.engine.save.cut.own_tiles import runs_of
from mpi_ckpt.engine.sync.captured import about_leaf
from mpi_ckpt.errors import StageError
from mpi_ckpt.leaves.digest import BLOCK_BYTES, DIGEST_BYTES, BlockHasher, Digest
from mpi_ckpt.storage.format.tile_table import file_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.save.cut.own_tiles import CapturedTiles
    from mpi_ckpt.leaves.leaf import Leaf
    from mpi_ckpt.storage.format.tile_table import TileEntry

PIECE_BYTES = 8 << 20
"""A file is passed on in pieces of this length."""

_SHORT_BYTES = 64 << 10
_DOING = "handing tiles to the leader of a host"


@dataclass(frozen=True, slots=True)
class DigestedTile:
    """A tile of this rank.

    Attributes:
        entry: Its place in the whole leaf.
        home: What it was captured with.
        leaf: Its memory.
        digest: The digest of its bytes.
    """

    entry: TileEntry
    home: CapturedTiles
    leaf: Leaf
    digest: Digest


def digest_tiles(captured: Sequence[CapturedTiles]) -> list[DigestedTile]:
    """Digest the tiles that this rank gives, in the order in which it hands them over.

    Not collective. Copies a few MiB at a time of tiles that are not contiguous.

    Raises:
        CheckpointError: On the calling rank, if a tile cannot be read.
    """
    tiles = []
    for one in captured:
        known = list(one.digests) if one.digests is not None else [None] * len(one.leaves)
        for entry, leaf, digest in zip(one.entries, one.leaves, known, strict=True):
            if digest is None:
                hasher = BlockHasher(BLOCK_BYTES)
                with about_leaf(one, leaf):
                    for run in runs_of(leaf):
                        hasher.update(run)
                digest = hasher.finish()
            tiles.append(DigestedTile(entry, one, leaf, digest))
    tiles.sort(key=lambda tile: handing_order(tile.entry))
    return [tiles[number] for number in file_order([tile.entry for tile in tiles])]


def encode_digests(tiles: Sequence[DigestedTile]) -> bytes:
    """Return the digests of tiles, as `decode_digests` takes them. Not collective."""
    return b"".join(block for tile in tiles for block in tile.digest.blocks)


def count_digests(entries: Sequence[TileEntry]) -> int:
    """Return how many bytes `encode_digests` returns. Not collective. Thread-safe."""
    return DIGEST_BYTES * sum(map(_blocks_of, entries))


def decode_digests(entries: Sequence[TileEntry], data: memoryview) -> list[Digest]:
    """Return the digest of each tile. Not collective. Thread-safe.

    Args:
        entries: The tiles, in the order in which they are handed over.
        data: What `encode_digests` returned.
    """
    blocks = [bytes(data[n : n + DIGEST_BYTES]) for n in range(0, len(data), DIGEST_BYTES)]
    digests, first = [], 0
    for entry in entries:
        last = first + _blocks_of(entry)
        digests.append(Digest(tuple(blocks[first:last])))
        first = last
    return digests


def _blocks_of(entry: TileEntry) -> int:
    return max(1, -(-entry.nbytes // BLOCK_BYTES))


class SteadyTiles:
    """The bytes of this rank's tiles, as many as announced whatever fails.

    Not collective. Read once.

    Args:
        tiles: The tiles, in order.

    Attributes:
        nbytes: Number of all bytes.
        failure: Why a tile could not be read; zeros have taken its place since.
    """

    def __init__(self, tiles: Sequence[DigestedTile]) -> None:
        self._tiles = tiles
        self.nbytes = sum(tile.entry.nbytes for tile in tiles)
        self.failure: Exception | None = None

    def runs(self) -> Iterator[memoryview]:
        """Yield the bytes, in order."""
        for tile in self._tiles:
            left = tile.entry.nbytes
            for run in self._runs_of(tile):
                left -= len(run)
                yield run
            while left:
                zeros = memoryview(bytes(min(left, _SHORT_BYTES)))
                left -= len(zeros)
                yield zeros

    def _runs_of(self, tile: DigestedTile) -> Iterator[memoryview]:
        hasher = BlockHasher(BLOCK_BYTES)
        runs = iter(runs_of(tile.leaf))
        while self.failure is None:
            try:
                with about_leaf(tile.home, tile.leaf):
                    run = next(runs, None)
                    if run is None:
                        self._require_unchanged(hasher.finish(), tile)
                        return
            except Exception as error:
                self.failure = error
                return
            hasher.update(run)
            yield run

    def _require_unchanged(self, digest: Digest, tile: DigestedTile) -> None:
        # INVARIANT: no digest of other bytes than those written gets into a manifest.
        if digest != tile.digest:
            raise StageError(
                f"{tile.entry.box} has changed while the save was being made: nothing of "
                "it is kept on the hosts"
            )


class HandedStream:
    """Runs of bytes, of which any number can be taken at a time. Not collective.

    Args:
        runs: The runs.
    """

    def __init__(self, runs: Iterator[memoryview]) -> None:
        self._runs = runs
        self._rest = memoryview(b"")

    def take(self, nbytes: int) -> Iterator[memoryview]:
        """Yield the next bytes."""
        while nbytes:
            if not self._rest:
                self._rest = next(self._runs)
            run, self._rest = self._rest[:nbytes], self._rest[nbytes:]
            nbytes -= len(run)
            yield run


def hand_to_leader(comm: Communicator, leader: int, own: SteadyTiles) -> None:
    """Send the bytes of this rank's tiles to the leader of its host.

    Not collective: the leader receives them. Main thread only.
    """
    for piece in join_runs(own.runs(), own.nbytes, _piece_bytes(comm)):
        exchange_messages(comm, [(leader, piece)], [], _DOING)


def received_runs(comm: Communicator, rank: int, nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes that a rank of this host hands over. On its leader. Main thread only.

    Not collective: that rank calls `hand_to_leader`.
    """
    for length in piece_lengths(nbytes, _piece_bytes(comm)):
        piece = np.empty(length, np.uint8)
        exchange_messages(comm, [], [(rank, piece)], _DOING)
        yield piece.data


def join_runs(
    runs: Iterator[memoryview], nbytes: int, piece_bytes: int = PIECE_BYTES
) -> Iterator[NDArray[np.uint8]]:
    """Yield runs as pieces of `piece_lengths`. Not collective.

    Args:
        runs: The runs.
        nbytes: Their length together.
        piece_bytes: The length of a piece.
    """
    stream = HandedStream(runs)
    for length in piece_lengths(nbytes, piece_bytes):
        piece, filled = np.empty(length, np.uint8), 0
        for run in stream.take(length):
            piece[filled : filled + len(run)] = np.frombuffer(run, np.uint8)
            filled += len(run)
        yield piece


def piece_lengths(nbytes: int, piece_bytes: int = PIECE_BYTES) -> list[int]:
    """Return the lengths of the pieces of so many bytes. Not collective. Thread-safe."""
    return [min(piece_bytes, nbytes - n) for n in range(0, nbytes, piece_bytes)]


def _piece_bytes(comm: Communicator) -> int:
    topology = comm.topology
    ranks = len(topology.ranks_of(int(topology.node_of[comm.rank])))
    return max(_SHORT_BYTES, PIECE_BYTES // ranks)
