# SPDX-License-Identifier: Apache-2.0
"""Decides which rank writes a box that several ranks hold. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.decomposition.boxes import Box


class Duplicate(NamedTuple):
    """A tile that its rank does not write, because an owner writes the same box.

    Attributes:
        rank: The rank that holds it.
        number: Its number among this rank's tiles.
        owner: The rank that writes the box.
        owners_number: The written tile's number among the owner's tiles.
    """

    rank: int
    number: int
    owner: int
    owners_number: int


@dataclass(frozen=True, slots=True)
class Ownerships:
    """Which tiles each rank writes.

    Attributes:
        owned: For each rank the numbers of the tiles that it writes, in increasing order.
            No rank writes an empty tile.
        duplicates: All other tiles that are not empty, by leaf and box in the order of
            their first holders.
    """

    owned: tuple[tuple[int, ...], ...]
    duplicates: tuple[Duplicate, ...]


def assign_owners(
    tiles: Sequence[Sequence[tuple[int, Box]]],
    itemsizes: Sequence[int],
    loads: Sequence[int] = (),
) -> Ownerships:
    """Choose a single owner for each box, among the ranks that hold it.

    Not collective. Thread-safe. The largest boxes come first, and each goes to the holder
    with the least bytes (R. L. Graham, 1969: at most 4/3 of the optimum if every rank
    holds every box).

    Args:
        tiles: For each rank its tiles: number of the leaf, and box.
        itemsizes: For each leaf the bytes of an element.
        loads: For each rank the bytes that it writes anyway; none by default.

    Returns:
        The owners; the same for the same arguments.
    """
    holders: dict[tuple[int, Box], list[tuple[int, int]]] = {}
    for rank, shown in enumerate(tiles):
        for number, tile in enumerate(shown):
            # An empty box is equal to others of no element, and has nothing to write.
            if 0 not in tile[1].shape:
                holders.setdefault(tile, []).append((rank, number))
    nbytes = {(leaf, box): box.size * itemsizes[leaf] for leaf, box in holders}
    written = list(loads) or [0] * len(tiles)
    owners: dict[tuple[int, Box], tuple[int, int]] = {}
    # A box that only one rank holds adds to its load before there is anything to choose.
    for tile in sorted(holders, key=lambda t: (len(holders[t]) > 1, -nbytes[t])):
        owner = min(holders[tile], key=lambda holder: (written[holder[0]], holder))
        owners[tile] = owner
        written[owner[0]] += nbytes[tile]
    owned: list[list[int]] = [[] for _ in tiles]
    for rank, number in owners.values():
        owned[rank].append(number)
    return Ownerships(
        tuple(tuple(sorted(numbers)) for numbers in owned),
        tuple(
            Duplicate(*holder, *owners[tile])
            for tile, ranks in holders.items()
            for holder in ranks
            if holder != owners[tile]
        ),
    )
