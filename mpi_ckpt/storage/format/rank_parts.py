# SPDX-License-Identifier: Apache-2.0
"""Names the leaves of states of which each rank has a part, and finds the parts. Pure.

The part of rank 3 is the leaf ``rank-00003.json``, which has its structure, and its
tensors and arrays, ``rank-00003/...``. In the first form a part was a single leaf,
``rank-00003``, with all its bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_PART = re.compile(r"rank-(\d{5,9})(?:\.json|/(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PartLeaves:
    """The leaves of one rank's part.

    Attributes:
        structure: Number of the leaf with the structure; None in the first form, whose
            single leaf has all bytes.
        numbers: Numbers of the other leaves, in saving order.
        names: Their names within the part.
    """

    structure: int | None
    numbers: tuple[int, ...]
    names: tuple[str, ...]


def structure_name(rank: int) -> str:
    """Return the name of the leaf with the structure of a part. Not collective."""
    return f"rank-{rank:05d}.json"


def part_leaf_name(rank: int, name: str) -> str:
    """Return the name of another leaf of a part. Not collective.

    Args:
        rank: The rank whose part it is.
        name: Name of the leaf within the part; empty if the part is a single array.
    """
    return f"rank-{rank:05d}/{name}" if name else f"rank-{rank:05d}"


def find_parts(names: Sequence[str]) -> list[PartLeaves]:
    """Find the parts of all ranks, in rank order, by the names of a state's leaves.

    Not collective. Thread-safe.

    Returns:
        The parts; an empty list if the leaves are not those of parts.
    """
    if list(names) == [part_leaf_name(rank, "") for rank in range(len(names))]:
        return [PartLeaves(None, (rank,), ("",)) for rank in range(len(names))]
    structures: dict[int, int] = {}
    leaves: dict[int, dict[int, str]] = {}
    for number, name in enumerate(names):
        match = _PART.fullmatch(name)
        if match is None:
            return []
        rank = int(match[1])
        if name == structure_name(rank):
            structures[rank] = number
        elif name == part_leaf_name(rank, match[2] or ""):
            leaves.setdefault(rank, {})[number] = match[2] or ""
        else:
            return []
    if sorted(structures) != list(range(len(structures))) or leaves.keys() - structures:
        return []
    of_ranks = [leaves.get(rank, {}) for rank in range(len(structures))]
    return [
        PartLeaves(structures[rank], tuple(mine), tuple(mine.values()))
        for rank, mine in enumerate(of_ranks)
    ]
