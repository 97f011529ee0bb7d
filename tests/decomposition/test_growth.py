# SPDX-License-Identifier: Apache-2.0
"""How the plan of a restore grows with the number of ranks."""

from itertools import product

import numpy as np
import pytest

from mpi_ckpt.decomposition.boxes import Box, grow, wrapped
from mpi_ckpt.decomposition.fragments import SavedTiles, WantedTiles
from mpi_ckpt.decomposition.reshard import plan_reshard

EDGE = 6
NEIGHBOURS = 26
# Of the numbers of ranks and files, which take more digits.
DIGITS = 1.1


def plans_of(side):
    """Return the plans of side**3 ranks, each with a cube and a layer of ghost cells."""
    shape, saved, wanted = (side * EDGE,) * 3, [], []
    for rank, place in enumerate(product(range(side), repeat=3)):
        box = Box(tuple(EDGE * at for at in place), (EDGE,) * 3)
        saved.append((0, rank, 0, box))
        parts = wrapped(grow(box, [(1, 1)] * 3), shape, (True,) * 3)
        wanted += [(0, rank, number, part) for number, (part, _) in enumerate(parts)]
    plan = plan_reshard(
        SavedTiles.of(saved),
        WantedTiles.of(wanted),
        itemsizes=np.array([8]),
        digest_bytes=1 << 24,
        readers=range(side**3),
        window_bytes=1 << 26,
    )
    return [plan.of_rank(rank) for rank in range(side**3)]


def longest(plans):
    return max(len(plan.encode()) for plan in plans)


def test_a_rank_reads_its_own_file_and_meets_its_neighbours_alone():
    for rank, plan in enumerate(plans_of(4)):
        assert plan.reads.file.tolist() == [rank]
        for table in (plan.sends, plan.receives):
            assert len(set(table.rank.tolist()) - {rank}) == NEIGHBOURS


@pytest.mark.parametrize("side", [4, 6])
def test_the_plan_of_a_rank_grows_with_its_neighbours_alone(side):
    few = plans_of(3)  # the least with 26 neighbours
    assert longest(plans_of(side)) <= DIGITS * longest(few)


def test_what_root_sends_grows_with_the_ranks():
    few, many = plans_of(3), plans_of(6)
    sent = [sum(len(plan.encode()) for plan in plans) for plans in (few, many)]
    assert sent[1] / sent[0] <= DIGITS * len(many) / len(few)
