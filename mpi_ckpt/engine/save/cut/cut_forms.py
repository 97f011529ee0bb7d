# SPDX-License-Identifier: Apache-2.0
"""Joins what each rank has of the cut leaves, and assigns each tile to a writer. Pure."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from mpi_ckpt.decomposition import tiling
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.decomposition.owners import assign_owners
from mpi_ckpt.errors import StageError, cut_lines
from mpi_ckpt.failures import name_ranks
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.storage.format.manifest import CutLeaf
from mpi_ckpt.storage.format.tile_table import TileEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mpi_ckpt.decomposition.tiling import TilingFault
    from mpi_ckpt.engine.sync.captured import CapturedState


class TileNumber(NamedTuple):
    """Which of a rank's tiles: the number of its form, and of the tile in it."""

    form: int
    tile: int


def handing_order(entry: TileEntry) -> tuple[str, str, Box]:
    """Return the key by which both sides sort tiles that are handed over.

    Not collective. Thread-safe.
    """
    return entry.state, entry.spec.name, entry.box


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a rank must know to write its tiles.

    Attributes:
        owned: The tiles that it writes.
        compared: Those of its tiles that other ranks have as well.
        rows: Number of a concatenated form -> all rows, and the first of this rank.
        writer: The rank that writes them; maybe itself.
        carried: Rank -> its tiles, if this rank writes those too.
    """

    owned: tuple[TileNumber, ...]
    compared: tuple[TileNumber, ...]
    rows: Mapping[int, tuple[int, int]]
    writer: int
    carried: Mapping[int, tuple[TileEntry, ...]]

    def encode(self) -> bytes:
        """Return the assignment as bytes. Not collective. Thread-safe."""
        rows = [[form, *counts] for form, counts in self.rows.items()]
        carried = [
            [rank, [[one.state, one.spec.to_json(), one.box] for one in entries]]
            for rank, entries in self.carried.items()
        ]
        return json.dumps([self.owned, self.compared, rows, self.writer, carried]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Assignment:
        """Return the assignment that `encode` encoded. Not collective. Thread-safe."""
        owned, compared, rows, writer, carried = json.loads(data)
        return cls(
            tuple([TileNumber(*one) for one in owned]),
            tuple([TileNumber(*one) for one in compared]),
            {form: (total, first) for form, total, first in rows},
            writer,
            {
                rank: tuple(
                    [
                        TileEntry(state, as_leaf_spec(*spec), as_box(*box))
                        for state, spec, box in entries
                    ]
                )
                for rank, entries in carried
            },
        )


def as_box(offset: Sequence[int], shape: Sequence[int]) -> Box:
    """Return a box from its JSON values. Not collective. Thread-safe."""
    return Box(tuple(offset), tuple(shape))


def as_leaf_spec(name: str, dtype: str, shape: Sequence[int]) -> LeafSpec:
    """Return a spec from its JSON values; one object for equal ones.

    Not collective. Thread-safe. All ranks have the same leaves, so root reads each as often
    as there are ranks.
    """
    return _spec(name, dtype, tuple(shape))


@lru_cache(maxsize=1 << 14)
def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> LeafSpec:
    return LeafSpec(name, dtype, shape)


_PROBLEMS_MAX = 16
_OUTSIDE = (
    " (if ranks outside of the manager's communicator do, give the manager a communicator "
    "of all of them)"
)


class CutForm(NamedTuple):
    """What one rank has of one cut leaf.

    Attributes:
        state: Name of the state.
        spec: Spec of the whole leaf; if concatenated, of this rank's rows.
        is_concatenated: As that of `Leaf`.
        is_compared: Whether ranks with the same box must have the same bytes in it.
        boxes: The boxes of the rank's tiles.
    """

    state: str
    spec: LeafSpec
    is_concatenated: bool
    is_compared: bool
    boxes: tuple[Box, ...]


class Replica(NamedTuple):
    """A tile that one rank has and another, its owner, writes."""

    state: str
    leaf: str
    box: Box
    rank: int
    tile: TileNumber
    owner: int
    owned: TileNumber


@dataclass(frozen=True, slots=True)
class JoinedForms:
    """What root knows of the cut leaves of all ranks.

    Attributes:
        leaves: State -> its cut leaves.
        assignments: One for each rank.
        replicas: The tiles that are not written, since an equal one is.
        nbytes: Bytes of all tiles that are written.
    """

    leaves: Mapping[str, tuple[CutLeaf, ...]]
    assignments: tuple[Assignment, ...]
    replicas: tuple[Replica, ...]
    nbytes: int


def encode_forms(captured: Iterable[CapturedState]) -> bytes:
    """Return what this rank has of the cut leaves. Not collective. Thread-safe."""
    forms = [
        [
            one.name,
            leaf.spec.to_json(),
            leaf.is_concatenated,
            not one.state.takes_any_replica,
            [tile.box for tile in leaf.tiles or ()],
        ]
        for one in captured
        for leaf in one.cut
    ]
    return json.dumps(forms).encode()


def _decode_forms(data: bytes) -> list[CutForm]:
    return [
        CutForm(
            state,
            as_leaf_spec(*spec),
            is_concatenated,
            is_compared,
            tuple([as_box(*box) for box in boxes]),
        )
        for state, spec, is_concatenated, is_compared, boxes in json.loads(data)
    ]


def join_forms(
    encoded: Sequence[bytes], hosts: Sequence[str], writers: Sequence[int]
) -> JoinedForms:
    """Find the whole leaves, and the one rank that writes each tile.

    Not collective. Thread-safe.

    Args:
        encoded: What `encode_forms` returned on each rank, in rank order.
        hosts: Name of each rank's host.
        writers: The rank that writes the tiles of each rank.

    Raises:
        StageError: On the calling rank, if the ranks disagree about a leaf, or its tiles
            leave a hole or overlap; with every problem.
    """
    forms = [_decode_forms(one) for one in encoded]
    parts: dict[tuple[str, str], list[_Part]] = {}
    for rank, of_rank in enumerate(forms):
        for number, form in enumerate(of_rank):
            key = (form.state, form.spec.name)
            parts.setdefault(key, []).append(_Part(rank, number, form))
    problems: list[str] = []
    placed: list[_PlacedLeaf] = []
    for (state, leaf), of_leaf in parts.items():
        try:
            placed.append(_place(of_leaf, len(encoded), hosts))
        except ValueError as problem:
            problems.append(f"state {state!r}, leaf {leaf!r}: {problem}")
    if problems:
        raise StageError(
            "leaves are not cut over the ranks without holes and overlaps; nothing was "
            "saved:\n    " + cut_lines("\n    ".join(problems), _PROBLEMS_MAX),
            problems=problems,
        )
    return _assign(placed, writers)


class _Part(NamedTuple):
    rank: int
    number: int
    form: CutForm


@dataclass(frozen=True, slots=True)
class _PlacedLeaf:
    """A cut leaf with its whole spec, and the boxes of each rank in its indices."""

    state: str
    spec: LeafSpec
    parts: list[_Part]
    boxes: Sequence[tuple[Box, ...]]


def _place(parts: list[_Part], size: int, hosts: Sequence[str]) -> _PlacedLeaf:
    """Return a leaf with the boxes of all ranks, which are proven to tile it.

    Raises:
        ValueError: On the calling rank, with the problem.
    """
    first = parts[0].form
    for part in parts:
        if _kind(part.form) != _kind(first):
            one, other = name_ranks([parts[0].rank], hosts), name_ranks([part.rank], hosts)
            raise ValueError(
                f"{one} has {_described(first)}, {other} has {_described(part.form)}"
            )
    if first.is_concatenated:
        return _concatenate(parts, size, hosts)
    boxes = [part.form.boxes for part in parts]
    ranks = [part.rank for part in parts for _ in part.form.boxes]
    fault = _fault(first.spec.shape, tuple([box for one in boxes for box in one]))
    if fault is not None:
        concerned = sorted({ranks[number] for number in fault.boxes})
        where = f" ({name_ranks(concerned, hosts)})" if concerned else _OUTSIDE
        raise ValueError(f"{fault.text}{where}; the whole has shape {first.spec.shape}")
    return _PlacedLeaf(first.state, first.spec, parts, boxes)


@lru_cache(maxsize=64)
def _fault(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> TilingFault | None:
    # A model has many leaves, and few ways in which these are cut.
    return tiling.fault(shape, boxes)


def _kind(form: CutForm) -> tuple[object, ...]:
    spec = form.spec
    shape = spec.shape[1:] if form.is_concatenated else spec.shape
    return spec.dtype, shape, form.is_concatenated


def _described(form: CutForm) -> str:
    if form.is_concatenated:
        return f"rows of {form.spec.dtype}{list(form.spec.shape[1:])}"
    return f"boxes of {form.spec.dtype}{list(form.spec.shape)}"


def _concatenate(parts: list[_Part], size: int, hosts: Sequence[str]) -> _PlacedLeaf:
    there = {part.rank for part in parts}
    lacking = [rank for rank in range(size) if rank not in there]
    if lacking:
        raise ValueError(
            f"{name_ranks(lacking, hosts)} lacks this column; a rank without rows gives "
            "an array with 0 rows"
        )
    spec = parts[0].form.spec
    row, first = spec.shape[1:], 0
    boxes: list[tuple[Box, ...]] = []
    for part in parts:
        count = part.form.spec.shape[0]
        boxes.append((Box((first, *(0 for _ in row)), (count, *row)),))
        first += count
    whole = LeafSpec(spec.name, spec.dtype, (first, *row))
    return _PlacedLeaf(parts[0].form.state, whole, parts, boxes)


def _assign(placed: Sequence[_PlacedLeaf], writers: Sequence[int]) -> JoinedForms:
    """Give each tile one owner among the ranks that have it."""
    size = len(writers)
    tiles: list[list[tuple[int, Box]]] = [[] for _ in range(size)]
    indices: list[list[TileNumber]] = [[] for _ in range(size)]
    rows: list[dict[int, tuple[int, int]]] = [{} for _ in range(size)]
    for number, leaf in enumerate(placed):
        for part, boxes in zip(leaf.parts, leaf.boxes, strict=True):
            tiles[part.rank] += [(number, box) for box in boxes]
            indices[part.rank] += [TileNumber(part.number, n) for n in range(len(boxes))]
            if part.form.is_concatenated:
                rows[part.rank][part.number] = (leaf.spec.shape[0], boxes[0].offset[0])
    widths = [dtypes.element_bytes(leaf.spec.dtype) for leaf in placed]
    owners = assign_owners(tiles, widths)
    replicas = []
    compared: list[set[TileNumber]] = [set() for _ in range(size)]
    for rank, at, owner, owners_at in owners.duplicates:
        number, box = tiles[rank][at]
        leaf, mine, theirs = placed[number], indices[rank][at], indices[owner][owners_at]
        if leaf.parts[0].form.is_compared:
            name = leaf.spec.name
            replicas.append(Replica(leaf.state, name, box, rank, mine, owner, theirs))
            compared[rank].add(mine)
            compared[owner].add(theirs)
    entries = {
        rank: [
            TileEntry(placed[leaf].state, placed[leaf].spec, box)
            for leaf, box in [tiles[rank][number] for number in owned]
        ]
        for rank, owned in enumerate(owners.owned)
        if writers[rank] != rank
    }
    assignments = [
        Assignment(
            tuple([indices[rank][number] for number in owned]),
            tuple(sorted(compared[rank])),
            rows[rank],
            writers[rank],
            {
                other: tuple(sorted(entries[other], key=handing_order))
                for other, writer in enumerate(writers)
                if writer == rank != other
            },
        )
        for rank, owned in enumerate(owners.owned)
    ]
    numbers = [tiles[rank][n][0] for rank, owned in enumerate(owners.owned) for n in owned]
    return _joined(placed, numbers, tuple(assignments), tuple(replicas))


def _joined(
    placed: Sequence[_PlacedLeaf],
    owned: Iterable[int],
    assignments: tuple[Assignment, ...],
    replicas: tuple[Replica, ...],
) -> JoinedForms:
    """Count the tiles of each leaf, given the leaf's number for each that is written."""
    counts = Counter(owned)
    leaves: dict[str, list[CutLeaf]] = {}
    for number, leaf in enumerate(placed):
        leaves.setdefault(leaf.state, []).append(CutLeaf(leaf.spec, counts[number]))
    return JoinedForms(
        {state: tuple(of_state) for state, of_state in leaves.items()},
        assignments,
        replicas,
        sum(leaf.spec.nbytes for leaf in placed),
    )
