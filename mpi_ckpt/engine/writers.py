# SPDX-License-Identifier: Apache-2.0
"""Which ranks write or read, and which leaves each writes. Pure."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, TypeVar

from mpi_ckpt.comm import ROOT

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from mpi_ckpt.comm import Topology
    from mpi_ckpt.options import Ranks

__all__ = ["choose_ranks", "split_by_bytes"]

Key = TypeVar("Key", bound="Hashable")


def choose_ranks(ranks: Ranks, topology: Topology) -> tuple[int, ...]:
    """Return the ranks that do a work, root first.

    Not collective. Thread-safe.

    Args:
        ranks: How they are chosen; of a host the lowest.
        topology: The ranks by host.
    """
    if ranks == "all":
        return tuple(range(len(topology.node_of)))
    if ranks == "node":
        return topology.leaders
    return (ROOT,)


def split_by_bytes(sizes: Iterable[tuple[Key, int]], parts: int) -> list[list[Key]]:
    """Split things over parts so that the parts are about equally heavy.

    Not collective. Thread-safe. Longest processing time first: each thing, the heaviest
    first, goes to the lightest part (R. L. Graham, 1969: at most 4/3 of the optimum).

    Args:
        sizes: Things and their bytes.
        parts: Number of parts.

    Returns:
        For each part its things, in the order they were given.
    """
    things = list(sizes)
    heaviest_first = sorted(range(len(things)), key=lambda i: -things[i][1])
    lightest = [(0, part) for part in range(parts)]
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for index in heaviest_first:
        weight, part = heapq.heappop(lightest)
        chosen[part].append(index)
        heapq.heappush(lightest, (weight + things[index][1], part))
    return [[things[i][0] for i in sorted(indices)] for indices in chosen]
