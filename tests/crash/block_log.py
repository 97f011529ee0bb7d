# SPDX-License-Identifier: Apache-2.0
"""The log of a block device, and the disks that a power cut can make of it.

A disk may keep what it is given in memory until it is told to flush: after a power cut
all writes before a flush are there, and of those since then any.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

WRITE, FLUSH, ACKNOWLEDGED = b"W", b"F", b"A"

_HEAD = struct.Struct("<cQQ")  # kind, offset, number of bytes that follow
_TRIES = 50  # for each image: how often to draw before there are taken to be no more


@dataclass(frozen=True)
class Record:
    """A write, a flush, or the acknowledgement of the save whose index is ``offset``."""

    kind: bytes
    offset: int = 0
    data: bytes = b""

    def encoded(self) -> bytes:
        return _HEAD.pack(self.kind, self.offset, len(self.data)) + self.data


def decoded(log: bytes) -> list[Record]:
    records, position = [], 0
    while position < len(log):
        kind, offset, size = _HEAD.unpack_from(log, position)
        position += _HEAD.size
        records.append(Record(kind, offset, log[position : position + size]))
        position += size
    return records


@dataclass(frozen=True)
class Cut:
    """Power fails before another flush: all records up to one, and some writes after it."""

    flush: int
    kept: frozenset[int]


def _next_flush(records: Sequence[Record], flush: int) -> int:
    for index in range(flush + 1, len(records)):
        if records[index].kind == FLUSH:
            return index
    return len(records)


def draw_cuts(
    records: Sequence[Record], number: int, rng: random.Random, *, first: int = 0
) -> list[Cut]:
    """Draw different cuts: at each flush as many, with half of the writes after it.

    Args:
        records: The log.
        number: How many, at most: a log has only so many.
        rng: Draws.
        first: Where in the log to begin.
    """
    flushes = [i for i, record in enumerate(records) if record.kind == FLUSH and i >= first]
    cuts: dict[Cut, None] = {}
    for turn in range(_TRIES * number):
        if turn % len(flushes) == 0:
            rng.shuffle(flushes)
        flush = flushes[turn % len(flushes)]
        after = range(flush + 1, _next_flush(records, flush))
        writes = [index for index in after if records[index].kind == WRITE]
        cuts[Cut(flush, frozenset(i for i in writes if rng.random() < 0.5))] = None
        if len(cuts) == number:
            break
    return list(cuts)


def acknowledged(records: Sequence[Record], cut: Cut) -> int:
    """Return the index of the last save whose flush the disk holds; -1 for none.

    An acknowledgement counts until the next flush: none came between it and the cut.
    """
    before = records[: _next_flush(records, cut.flush)]
    return max(
        (record.offset for record in before if record.kind == ACKNOWLEDGED), default=-1
    )


def disk_after(base: bytes, records: Sequence[Record], cut: Cut) -> bytearray:
    """Return what is on the disk after a cut."""
    disk = bytearray(base)
    for index in (*range(cut.flush), *sorted(cut.kept)):
        record = records[index]
        if record.kind == WRITE:
            disk[record.offset : record.offset + len(record.data)] = record.data
    return disk
