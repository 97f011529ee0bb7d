# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.comm.topology import Link, Topology

HOSTS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=12)


def nodes(topology):
    return [topology.ranks_of(node) for node in range(len(topology.names))]


def chain(topology, source):
    """The ranks that bytes pass from host to host, by the links of each."""
    passed, after = [source], topology.link(source, source).after
    while after is not None:
        assert topology.link(after, source).before == passed[-1]
        passed.append(after)
        after = topology.link(after, source).after
    return passed


def test_ranks_are_grouped_by_host_wherever_they_lie():
    topology = Topology.of(["b", "a", "b", "c", "a"])
    assert nodes(topology) == [[0, 2], [1, 4], [3]]
    assert topology.node_of.tolist() == [0, 1, 0, 2, 1]
    assert topology.leaders == (0, 1, 3)
    assert list(topology.hosts) == ["b", "a", "b", "c", "a"]
    assert topology.hosts[1:4] == ["a", "b", "c"]
    assert not topology.hosts.are_one


def test_one_host():
    topology = Topology.of(["a"] * 3)
    assert nodes(topology) == [[0, 1, 2]]
    assert topology.hosts.are_one
    assert chain(topology, 2) == [2]
    assert topology.link(0, 2) == Link(None, None, 2)


@pytest.mark.parametrize(
    ("source", "passed"), [(0, [0, 1, 3]), (2, [2, 1, 3]), (4, [4, 3, 0]), (3, [3, 0, 1])]
)
def test_a_chain_starts_at_its_source(source, passed):
    assert chain(Topology.of(["b", "a", "b", "c", "a"]), source) == passed


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
    reached = chain(topology, source)
    # Along the chain from the source on, and then within each node.
    assert sorted(hosts[rank] for rank in reached) == sorted(set(hosts))
    for rank in range(size):
        link = topology.link(rank, source)
        assert hosts[link.entry] == hosts[rank]
        assert link.entry in reached
        if rank not in reached:
            assert (link.before, link.after) == (None, None)


@given(HOSTS)
def test_each_node_has_its_ranks_in_order(hosts):
    topology = Topology.of(hosts)
    assert sorted(rank for ranks in nodes(topology) for rank in ranks) == [
        *range(len(hosts))
    ]
    for node, ranks in enumerate(nodes(topology)):
        assert ranks == sorted(ranks)
        assert {hosts[rank] for rank in ranks} == {topology.names[node]}
        assert topology.leaders[node] == ranks[0]
    assert list(topology.leaders) == sorted(topology.leaders)
