# SPDX-License-Identifier: Apache-2.0
"""In which order a generation is read: long runs of its files, a window at a time. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Batch", "Piece", "Place", "plan_reads"]

# Bytes between two leaves that are read along rather than skipped.
_GAP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a leaf lies: number of the file, offset and length in bytes."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One block of one leaf, as it is read, proven and sent.

    Attributes:
        leaf: Index of the leaf.
        block: Index of the block in the leaf.
        start: First byte of the block in the leaf.
        end: One past its last byte in the leaf.
        offset: Offset of the block in the file.
        last: Whether it is the leaf's last.
    """

    leaf: int
    block: int
    start: int
    end: int
    offset: int
    last: bool

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


@dataclass(slots=True)
class Batch:
    """A run of a file: number of the file, start and end in bytes, and the pieces in it."""

    file: int
    start: int
    end: int
    pieces: list[Piece] = field(default_factory=list)


def plan_reads(
    places: Sequence[Place], *, block_bytes: int, window_bytes: int
) -> list[Batch]:
    """Order the blocks of leaves by file and offset, and group them.

    Not collective. Thread-safe. The same places give the same plan on every rank.

    Args:
        places: Where each leaf lies.
        block_bytes: Block length of the generation.
        window_bytes: Most bytes of a batch, unless a single block has more.
    """
    # An empty leaf shares its offset with the one behind it and must come before that.
    order = sorted(
        range(len(places)),
        key=lambda i: (places[i].file, places[i].offset, places[i].nbytes),
    )
    batches: list[Batch] = []
    for leaf in order:
        place = places[leaf]
        for piece in _pieces(leaf, place, block_bytes):
            end = piece.offset + piece.nbytes
            current = batches[-1] if batches else None
            if (
                current is None
                or current.file != place.file
                or piece.offset - current.end > _GAP_BYTES
                or end - current.start > window_bytes
            ):
                current = Batch(place.file, piece.offset, end)
                batches.append(current)
            current.pieces.append(piece)
            current.end = max(current.end, end)
    return batches


def _pieces(leaf: int, place: Place, block_bytes: int) -> Iterator[Piece]:
    starts = range(0, max(place.nbytes, 1), block_bytes)
    for block, start in enumerate(starts):
        end = min(start + block_bytes, place.nbytes)
        last = block == len(starts) - 1
        yield Piece(leaf, block, start, end, place.offset + start, last)
