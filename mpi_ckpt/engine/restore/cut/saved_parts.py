# SPDX-License-Identifier: Apache-2.0
"""Reads and proves the parts of ranks in a generation, a few at a time. No MPI."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.states.packed import packed_head
from mpi_ckpt.storage.format.rank_parts import find_parts
from mpi_ckpt.storage.reading.assembly import read_box, stored_array
from mpi_ckpt.storage.reading.proving import proven_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpi_ckpt.storage.format.manifest import CutLeaf, StoredLeaf
    from mpi_ckpt.storage.reading.reader import GenerationReader


class SavedParts:
    """The parts of one state, as `RankedState.open_part` takes them.

    Not collective.

    Args:
        reader: The open generation.
        name: Name of the state.
        window_bytes: How much to read at a time, in bytes; a longer part is read alone.

    Attributes:
        found: The leaves of each part, in rank order.
    """

    def __init__(self, reader: GenerationReader, name: str, window_bytes: int) -> None:
        stored = reader.manifest.state(name)
        assert stored is not None
        self._leaves: list[StoredLeaf | CutLeaf] = [*stored.leaves, *stored.cut]
        self._reader = reader
        self._name = name
        self._window_bytes = window_bytes
        self._heads: dict[int, bytes] = {}
        self.found = find_parts([leaf.spec.name for leaf in self._leaves])

    def lengths(self, ranks: Sequence[int]) -> list[int]:
        """Return the lengths of some parts in bytes. Reads their structures.

        Raises:
            CorruptGenerationError: On the calling rank, if bytes are not those saved.
            ReadError: On the calling rank, if the operating system cannot read them.
        """
        self._read_structures(ranks)
        return [len(self._heads[rank]) + self._nbytes(rank) for rank in ranks]

    def read(self, ranks: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield some parts, each with its rank, in the order of the ranks.

        Raises:
            CorruptGenerationError: On the calling rank, if bytes are not those saved.
            ReadError: On the calling rank, if the operating system cannot read them.
        """
        self._read_structures(ranks)
        for some in self._windows(ranks):
            numbers = [number for rank in some for number in self.found[rank].numbers]
            data = iter(self._read(numbers))
            for rank in some:
                mine = [next(data) for _ in self.found[rank].numbers]
                yield rank, b"".join([self._heads.pop(rank), *mine])

    def _read_structures(self, ranks: Sequence[int]) -> None:
        """Make the heads of some parts that have none yet."""
        to_read: dict[int, int] = {}
        for rank in ranks:
            structure = self.found[rank].structure
            if rank in self._heads:
                continue
            if structure is None:
                self._heads[rank] = b""
            else:
                to_read[rank] = structure
        for rank, text in zip(to_read, self._read(list(to_read.values())), strict=True):
            part = self.found[rank]
            specs = [self._leaves[number].spec for number in part.numbers]
            self._heads[rank] = packed_head(bytes(text), specs, part.names)

    def _windows(self, ranks: Sequence[int]) -> Iterator[list[int]]:
        """Yield runs of ranks whose parts fit into a window together."""
        some: list[int] = []
        nbytes = 0
        for rank in ranks:
            more = self._nbytes(rank)
            if some and nbytes + more > self._window_bytes:
                yield some
                some, nbytes = [], 0
            some.append(rank)
            nbytes += more
        if some:
            yield some

    def _nbytes(self, rank: int) -> int:
        return sum(self._leaves[n].spec.nbytes for n in self.found[rank].numbers)

    def _read(self, numbers: Sequence[int]) -> list[bytearray]:
        """Return the proven bytes of some leaves."""
        leaves = [self._leaves[number] for number in numbers]
        arrived = [bytearray(leaf.spec.nbytes) for leaf in leaves]
        places, stored = [], []
        for place, leaf in enumerate(leaves):
            array = stored_array(self._reader, self._name, leaf)
            if array.is_whole:
                places.append(place)
                stored.append(array.tiles[0].leaf)
            else:
                whole = Box.whole(leaf.spec.shape)
                read_box(self._reader, array, whole, memoryview(arrived[place]))
        if not stored:
            return arrived
        blocks = proven_blocks(self._reader, stored, window_bytes=self._window_bytes)
        with closing(blocks):
            for block, data in blocks:
                arrived[places[block.leaf]][block.start : block.end] = data
        return arrived
