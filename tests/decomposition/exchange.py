# SPDX-License-Identifier: Apache-2.0
"""Plays a restore in one process, by the ranks' own plans alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.decomposition.fragments import SavedTiles, WantedTiles
from mpi_ckpt.decomposition.rank_plan import RankPlan
from mpi_ckpt.decomposition.regions import elements_of
from mpi_ckpt.decomposition.reshard import plan_reshard
from tests.decomposition.drawing import slices

if TYPE_CHECKING:
    from mpi_ckpt.decomposition.boxes import Box


@dataclass
class Case:
    """A generation, and what ranks want of it.

    Attributes:
        arrays: The whole leaves.
        saved: Leaf, file, first byte and box of each saved tile.
        wanted: Leaf, rank, number and box of each wanted tile.
        files: The bytes of each file.
        size: Number of ranks.
        digest_bytes: Length of a digest block, as in the last plan.
    """

    arrays: list[np.ndarray]
    saved: list[tuple[int, int, int, Box]]
    wanted: list[tuple[int, int, int, Box]]
    files: list[bytes]
    size: int
    digest_bytes: int = 0

    def plan(self, **options):
        self.digest_bytes = options["digest_bytes"]
        return plan_reshard(
            SavedTiles.of(self.saved),
            WantedTiles.of(self.wanted),
            itemsizes=np.array([a.itemsize for a in self.arrays]),
            **options,
        )


@dataclass
class Played:
    """What ranks did.

    Attributes:
        tiles: The bytes that came for each wanted tile, by rank and number.
        reads: File, start and end of each read.
        loads: Bytes read by each rank.
        messages: Turn, sender, receiver and bytes of each message.
    """

    tiles: dict[tuple[int, int], bytearray] = field(default_factory=dict)
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    loads: dict[int, int] = field(default_factory=dict)
    messages: list[tuple[int, int, int, int]] = field(default_factory=list)


def play(case: Case, plan) -> Played:
    """Read, send, receive and keep what each rank's plan says, turn by turn."""
    plans = [RankPlan.decode(plan.of_rank(rank).encode()) for rank in range(case.size)]
    played = Played()
    for leaf, rank, number, box in case.wanted:
        nbytes = box.size * case.arrays[leaf].itemsize
        played.tiles[rank, number] = bytearray(b"\xee" * nbytes)
    assert {one.turns for one in plans} == {plan.turns}
    for number in range(plan.turns):
        turns = [one.turn(number) for one in plans]
        mail = {}
        for rank, (one, turn) in enumerate(zip(plans, turns, strict=True)):
            piece = read_window(case, played, rank, one, turn)
            keep(one, turn, piece, target_of(played, rank))
            assert [t.rank for t in turn.sends] == sorted({t.rank for t in turn.sends})
            for at, transfer in enumerate(turn.sends):
                message = np.empty(transfer.nbytes, np.uint8)
                pack(one, transfer, piece, message)
                mail[rank, transfer.rank] = message
                first = turn.sends[turn.first_alike[at]]
                assert np.array_equal(message, mail[rank, first.rank])
                played.messages.append((number, rank, transfer.rank, transfer.nbytes))
        for rank, (one, turn) in enumerate(zip(plans, turns, strict=True)):
            for transfer in turn.receives:
                message = mail.pop((transfer.rank, rank))
                assert len(message) == transfer.nbytes
                unpack(one, transfer, message, target_of(played, rank))
        assert mail == {}
    return played


def read_window(case, played, rank, plan, turn):
    if turn.window is None:
        assert not turn.pieces
        return None
    reads = plan.reads
    file, start, end = (int(c[turn.window]) for c in (reads.file, reads.start, reads.end))
    played.reads.append((file, start, end))
    played.loads[rank] = played.loads.get(rank, 0) + end - start
    data = memoryview(case.files[file])[start:end]
    for row in turn.pieces:
        check_block(case, plan.pieces, row, file)

    def piece(row):
        assert row in turn.pieces
        first = int(plan.pieces.position[row]) - start
        nbytes = int(plan.pieces.nbytes[row])
        assert first >= 0
        assert first + nbytes <= len(data)
        return data[first : first + nbytes]

    return piece


def check_block(case, pieces, row, file):
    """Check that a piece is one whole digest block of its tile."""
    columns = (pieces.tile, pieces.leaf, pieces.number, pieces.position, pieces.nbytes)
    tile, leaf, number, position, nbytes = (int(column[row]) for column in columns)
    saved_leaf, saved_file, first, box = case.saved[tile]
    assert (saved_leaf, saved_file) == (leaf, file)
    ndim = len(box.shape)
    offset, shape = pieces.offsets[row].tolist(), pieces.shapes[row].tolist()
    assert (tuple(offset[len(offset) - ndim :]), tuple(shape[len(shape) - ndim :])) == box
    start = number * case.digest_bytes
    whole = box.size * case.arrays[leaf].itemsize
    assert position == first + start
    assert nbytes == min(case.digest_bytes, whole - start)


def target_of(played, rank):
    return lambda number: memoryview(played.tiles[rank, number])


def expected_bytes(case: Case, leaf: int, box: Box) -> bytes:
    return case.arrays[leaf][slices(box)].tobytes()


def pack(plan, transfer, piece, message):
    """Fill a message with its fragments."""
    position = 0
    for row in transfer.fragments:
        unit = int(plan.sends.unit[row])
        elements = elements_of(piece(int(plan.sends.piece[row])), unit)
        view = plan.sends.source.view(row, elements)
        end = position + view.size * unit
        elements_of(message[position:end], unit).reshape(view.shape)[...] = view
        position = end


def unpack(plan, transfer, message, target):
    """Put the fragments of a message where they belong."""
    position = 0
    for row in transfer.fragments:
        unit = int(plan.receives.unit[row])
        elements = elements_of(target(int(plan.receives.target[row])), unit)
        view = plan.receives.goal.view(row, elements)
        end = position + view.size * unit
        view[...] = elements_of(message[position:end], unit).reshape(view.shape)
        position = end


def keep(plan, turn, piece, target):
    """Copy the fragments that a rank reads for itself."""
    kept = plan.kept
    for row in turn.kept:
        unit = int(kept.unit[row])
        source = elements_of(piece(int(kept.piece[row])), unit)
        goal = elements_of(target(int(kept.target[row])), unit)
        kept.goal.view(row, goal)[...] = kept.source.view(row, source)
