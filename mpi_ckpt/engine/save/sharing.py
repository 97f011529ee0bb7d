# SPDX-License-Identifier: Apache-2.0
"""Decides which leaves each of several writers writes."""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mpi_ckpt.comm import scatter_bytes
from mpi_ckpt.engine.sync.captured import pick_leaves

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.sync.captured import CapturedState

Key = TypeVar("Key", bound="Hashable")

Share = dict[str, list[int]]
"""State name -> indices of the leaves that one rank writes."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a rank must know to write its share of a generation.

    Attributes:
        generation: Its number.
        job: Root's name of the job.
        share: The leaves that the rank writes.
    """

    generation: int
    job: str
    share: Share


def share_out(
    captured: Sequence[CapturedState],
    fresh: Sequence[Sequence[int]],
    equal: Collection[str],
    writers: Sequence[int],
) -> dict[int, Share]:
    """Decide which leaves each writer writes.

    Not collective. Thread-safe. Pure.

    Args:
        captured: The contents of the save.
        fresh: For each of them, the indices of leaves not shared with older generations.
        equal: Names of the states that any writer may write.
        writers: Ranks of the writers, root first.
    """
    free: list[tuple[tuple[str, int], int]] = []
    bound: list[tuple[str, int]] = []
    for content, numbers in zip(captured, fresh, strict=True):
        for number in numbers:
            if content.name in equal:
                free.append(((content.name, number), content.specs[number].nbytes))
            else:
                bound.append((content.name, number))
    split = split_by_bytes(free, len(writers))
    split[0] = [*bound, *split[0]]
    shares: dict[int, Share] = {rank: {} for rank in writers}
    for rank, keys in zip(writers, split, strict=True):
        for name, number in keys:
            shares[rank].setdefault(name, []).append(number)
    return shares


def split_by_bytes(sizes: Iterable[tuple[Key, int]], parts: int) -> list[list[Key]]:
    """Split items over parts so that the parts have about equal sizes.

    Not collective. Thread-safe. Longest processing time first: each item, the largest
    first, goes to the smallest part (R. L. Graham, 1969: at most 4/3 of the optimum).

    Args:
        sizes: Items and their bytes.
        parts: Number of parts.

    Returns:
        The items of each part, in their given order.
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


def pick_share(
    captured: Sequence[CapturedState], share: Mapping[str, Sequence[int]]
) -> list[CapturedState]:
    """Return the leaves of a share. Not collective. Thread-safe."""
    return [
        pick_leaves(content, share[content.name])
        for content in captured
        if content.name in share
    ]


def deal_tasks(comm: Communicator, tasks: Sequence[Task], window_bytes: int) -> Task:
    """Send each rank its own task from root.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        tasks: A task for each rank, in rank order, on root; empty elsewhere.
        window_bytes: Limit of the bytes in flight.
    """
    encoded = [
        json.dumps([task.generation, task.job, task.share]).encode() for task in tasks
    ]
    doing = "sharing out a save"
    mine = scatter_bytes(comm, encoded, doing, window_bytes=window_bytes)
    return Task(*json.loads(mine))
