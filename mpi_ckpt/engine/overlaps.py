# SPDX-License-Identifier: Apache-2.0
"""Finds leaves that would arrive in the same memory, and moves them apart in time.

Two values of the program may share memory: "the best weights so far" begin as the weights
of the model, an optimizer's anchor as the parameter itself. If they were saved with
different bytes, one would overwrite the other. If both were saved with the same bytes, as
views of one memory are, they may stay together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mpi_ckpt.comm import collect
from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.leaves.buckets import find_spans
from mpi_ckpt.leaves.leaf import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.errors import CheckpointError
    from mpi_ckpt.leaves.leaf import Leaf


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two leaves that share memory on a rank.

    Attributes:
        leaves: Their indices.
        places: The place of each.
    """

    leaves: tuple[int, int]
    places: tuple[Place, Place]


class Source(Protocol):
    """Provides the bytes that will arrive. Not collective."""

    def bytes_of(self, index: int) -> memoryview:
        """Return the bytes that will arrive for a leaf."""

    def digest_of(self, index: int) -> bytes:
        """Return their digest."""


def find_overlaps(leaves: Sequence[Leaf | None]) -> list[Overlap]:
    """Return the pairs of leaves whose memory may overlap on this rank.

    Not collective. It compares first and last bytes: `hold_both` decides whether an overlap
    matters.

    Args:
        leaves: The destinations of bytes; None for a leaf without one.
    """
    starts, ends = find_spans(leaves).T
    order = np.lexsort((ends, starts))
    order = order[starts[order] < ends[order]]
    starts, ends = starts[order], ends[order]
    # Usually no leaf reaches into the next, and there is no more work.
    reach = np.maximum.accumulate(ends) if len(ends) else ends
    if not (starts[1:] < reach[:-1]).any():
        return []
    return [
        Overlap((i, j), (first_place, second_place))
        for i, j in _pairs(order.tolist(), starts.tolist(), ends.tolist())
        if (first_place := _place(leaves[i])) and (second_place := _place(leaves[j]))
    ]


def differing_overlaps(
    comm: Communicator,
    mine: Sequence[Overlap],
    source: Source,
    *,
    doing: str,
    error: type[CheckpointError],
) -> list[Overlap]:
    """Let root decide which overlaps matter: memory that cannot hold both leaves' bytes.

    Collective. Main thread only. For the rare case that some rank has overlaps.

    Args:
        comm: The communicator.
        mine: The overlaps of this rank.
        source: Provides the bytes that will arrive, on root.
        doing: What the ranks meet for, for the error if one never arrives.
        error: Class for exceptions that this package does not define.

    Returns:
        The overlaps of this rank that matter.

    Raises:
        CheckpointError: On every rank, if root cannot read the bytes.
        CollectiveError: On every live rank, if one never arrives.
    """
    known: dict[bytes, list[bool]] = {}

    def judge(pairs: bytes) -> list[bool]:
        if pairs not in known:
            known[pairs] = [not _agree(overlap, source) for overlap in _decode(pairs)]
        return known[pairs]

    verdicts = collect(
        comm,
        doing,
        lambda: _encode(mine),
        lambda parts: [judge(part) for part in parts],
        error=error,
    )
    return [
        overlap
        for overlap, matters in zip(mine, verdicts[comm.rank], strict=True)
        if matters
    ]


def separate_overlaps(
    overlaps: Sequence[Overlap],
    move: Callable[[int], bool],
    name_of: Callable[[int], str],
) -> None:
    """Give one leaf of each overlap private memory.

    Not collective. The later leaf if it can be moved, else the earlier one.

    Args:
        overlaps: The overlaps that matter.
        move: Moves a leaf, if its state has other memory for it; returns whether it did.
        name_of: Returns the name of a leaf in messages.

    Raises:
        StateMismatchError: On the calling rank, if neither can be moved.
    """
    moved: set[int] = set()
    problems = []
    for overlap in overlaps:
        first, second = overlap.leaves
        if moved & {first, second}:
            continue
        for candidate in (second, first):
            if move(candidate):
                moved.add(candidate)
                break
        else:
            problems.append(
                f"{name_of(first)} and {name_of(second)} share memory in the program, and "
                "were saved with different values: make one of them a copy"
            )
    if problems:
        raise StateMismatchError(
            "values of the program share memory, nothing was changed:\n  "
            + "\n  ".join(problems),
            problems=problems,
        )


def hold_both(
    first_place: Place, first: memoryview, second_place: Place, second: memoryview
) -> bool:
    """Return whether memory can hold the bytes of two leaves at once.

    Not collective. Thread-safe. Pure: tries it in an image of the memory.

    Args:
        first_place: Place of the first.
        first: Its bytes, in C order.
        second_place: Place of the second.
        second: Its bytes.
    """
    (start, end), (other_start, other_end) = first_place.span, second_place.span
    base = min(start, other_start)
    image = np.zeros(max(end, other_end) - base, np.uint8)
    targets = [_within(image, base, place) for place in (first_place, second_place)]
    values = [
        _as_it_lies(place, data).view(f"V{place.itemsize}").reshape(place.shape)
        for place, data in ((first_place, first), (second_place, second))
    ]
    for target, value in zip(targets, values, strict=True):
        target[...] = value
    return all(
        target.tobytes() == value.tobytes()
        for target, value in zip(targets, values, strict=True)
    )


def _agree(overlap: Overlap, source: Source) -> bool:
    (i, j), (first_place, second_place) = overlap.leaves, overlap.places
    if first_place == second_place:
        return source.digest_of(i) == source.digest_of(j)
    return hold_both(first_place, source.bytes_of(i), second_place, source.bytes_of(j))


def _as_it_lies(place: Place, data: memoryview) -> np.ndarray:
    """Return the bytes of a leaf as its memory would hold them."""
    found: np.ndarray = np.frombuffer(data, np.uint8)
    if place.swapped:
        found = found.reshape(-1, place.swapped)[:, ::-1].reshape(-1)
    if place.flipped:
        bits = np.frombuffer(bytes.fromhex(place.flipped), np.uint8)
        found = (found.reshape(-1, place.itemsize) ^ bits).reshape(-1)
    return found


def _within(image: np.ndarray, base: int, place: Place) -> np.ndarray:
    found: np.ndarray = np.ndarray(
        place.shape,
        np.dtype(f"V{place.itemsize}"),
        image.data,
        place.address - base,
        place.strides,
    )
    return found


def _place(leaf: Leaf | None) -> Place | None:
    return None if leaf is None else leaf.buffer.place()


def _pairs(
    order: Sequence[int], starts: Sequence[int], ends: Sequence[int]
) -> Iterable[tuple[int, int]]:
    """Yield pairs of intersecting spans; the spans are sorted by their start."""
    open_spans: list[tuple[int, int]] = []
    for leaf, start, end in zip(order, starts, ends, strict=True):
        open_spans = [(e, other) for e, other in open_spans if e > start]
        for _, other in open_spans:
            yield min(leaf, other), max(leaf, other)
        open_spans.append((end, leaf))


def _encode(overlaps: Sequence[Overlap]) -> bytes:
    return json.dumps([[overlap.leaves, overlap.places] for overlap in overlaps]).encode()


def _decode(text: bytes) -> list[Overlap]:
    return [
        Overlap((i, j), (_to_place(first_place), _to_place(second_place)))
        for (i, j), (first_place, second_place) in json.loads(text)
    ]


def _to_place(values: Sequence[int | str | list[int]]) -> Place:
    address, itemsize, shape, strides, *more = values
    return Place(address, itemsize, tuple(shape), tuple(strides), *more)  # type: ignore[arg-type]
