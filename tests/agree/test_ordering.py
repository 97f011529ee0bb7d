# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from mpi_ckpt.comm.ordering import Claim, find_contradictions


def claims(*ranks: int, size: int | None = None, group: int = 0) -> list[Claim]:
    return [Claim(group, rank, len(ranks) if size is None else size) for rank in ranks]


def test_any_order_of_all_ranks_fits():
    assert find_contradictions(claims(0)) == []
    assert find_contradictions(claims(2, 0, 1)) == []


def test_groups_side_by_side_and_ranks_in_none_fit():
    told = [*claims(1, 0), Claim(None, -1, 0), *claims(0, 1, 2, group=2)]
    assert find_contradictions(told) == []


def test_job_that_mpi_sees_a_part_of_is_told():
    assert find_contradictions(claims(1, size=4)) == [
        "rank 0 of MPI is rank 1 of 4 there, and MPI sees 1 such process: [0]"
    ]
    (first, second) = find_contradictions(claims(0, 1, size=1))
    assert "rank 1 of MPI is rank 1 of 1 there, and MPI sees 2 such processes" in second
    assert "[0, 1]" in first


def test_one_rank_twice_is_told():
    assert find_contradictions(claims(0, 1, 0)) == [
        "ranks 0 and 2 of MPI are both rank 0 there"
    ]
