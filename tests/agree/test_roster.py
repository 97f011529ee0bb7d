# SPDX-License-Identifier: Apache-2.0
"""What each rank says of itself reaches root in few messages, and grows with the hosts."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.comm.roster import Roster, children_of, parent_of


def gather(says, rank=0):
    """Join the rosters of a rank and of those below it, as the messages would."""
    below = [
        Roster.decode(gather(says, child).encode())
        for child in children_of(rank, len(says))
    ]
    return Roster.join([Roster.own(*says[rank]), *below])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "no"])), min_size=1))
def test_root_learns_what_every_rank_says_in_the_order_of_ranks(says):
    roster = gather(says)
    for column, of_rank in ((roster.hosts, 0), (roster.objections, 1)):
        found = [column.texts[index] for index in column.index_of]
        assert found == [each[of_rank] for each in says]
        assert list(column.texts) == list(dict.fromkeys(found))


@given(st.integers(1, 5000), st.data())
def test_the_tree_has_every_rank_below_one_parent(size, data):
    rank = data.draw(st.integers(0, size - 1))
    children = children_of(rank, size)
    assert all(parent_of(child) == rank for child in children)
    assert len(children) <= math.ceil(math.log2(size))
    if rank:
        assert rank in children_of(parent_of(rank), size)


def test_it_grows_with_the_hosts_and_not_with_the_ranks():
    def encoded(hosts, each):
        names = [(f"node{host:05d}", "") for host in range(hosts) for _ in range(each)]
        return len(gather(names).encode())

    assert encoded(16, 64) - encoded(16, 8) <= 16 * 2
    assert encoded(64, 4) <= 64 * 24
