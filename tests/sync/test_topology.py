# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.comm.topology import Link, Topology

HOSTS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=12)


def test_ranks_are_grouped_by_host_wherever_they_lie():
    topology = Topology.of(["b", "a", "b", "c", "a"])
    assert topology.nodes == ((0, 2), (1, 4), (3,))
    assert topology.node_of == (0, 1, 0, 2, 1)
    assert topology.leaders == (0, 1, 3)


def test_one_host():
    topology = Topology.of(["a"] * 3)
    assert topology.nodes == ((0, 1, 2),)
    assert topology.chain(2) == (2,)
    assert topology.link(0, 2) == Link(None, None, 2)


@pytest.mark.parametrize(
    ("source", "chain"), [(0, (0, 1, 3)), (2, (2, 1, 3)), (4, (4, 3, 0)), (3, (3, 0, 1))]
)
def test_a_chain_starts_at_its_source(source, chain):
    assert Topology.of(["b", "a", "b", "c", "a"]).chain(source) == chain


def test_the_links_of_a_chain():
    topology = Topology.of(["a", "b", "a", "c"])
    assert [topology.link(rank, 2) for rank in range(4)] == [
        Link(None, None, 2),
        Link(2, 3, 1),
        Link(None, 1, 2),
        Link(1, None, 3),
    ]


@given(HOSTS, st.data())
def test_every_rank_is_reached_once(hosts, data):
    topology = Topology.of(hosts)
    size = len(hosts)
    source = data.draw(st.integers(0, size - 1))
    links = [topology.link(rank, source) for rank in range(size)]
    entries = topology.entries(source)
    assert sorted(topology.chain(source)) == sorted(entries)
    assert source in entries
    # Along the chain from the source on, and then within each node.
    reached, rank = [source], source
    while (after := links[rank].after) is not None:
        assert links[after].before == rank
        rank = after
        reached.append(rank)
    assert reached == list(topology.chain(source))
    for rank, link in enumerate(links):
        assert hosts[link.entry] == hosts[rank]
        assert link.entry in reached
        if rank not in reached:
            assert (link.before, link.after) == (None, None)


@given(HOSTS)
def test_each_node_has_its_ranks_in_order(hosts):
    topology = Topology.of(hosts)
    assert sorted(rank for ranks in topology.nodes for rank in ranks) == [
        *range(len(hosts))
    ]
    for node, ranks in enumerate(topology.nodes):
        assert list(ranks) == sorted(ranks)
        assert len({hosts[rank] for rank in ranks}) == 1
        assert all(topology.node_of[rank] == node for rank in ranks)
    assert list(topology.leaders) == sorted(topology.leaders)
