# SPDX-License-Identifier: Apache-2.0
"""Which hosts hold each file: in different domains, as much on each, in few groups."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.engine.hosts.placement import (
    count_copies,
    count_shares,
    order_turns_of_files,
    place_files,
    place_own_files,
)


def names(count):
    return [f"node{number}" for number in range(count)]


def loads(sizes, placed, hosts):
    return [
        sum(size for size, holders in zip(sizes, placed, strict=True) if host in holders)
        for host in range(hosts)
    ]


@st.composite
def layouts(draw):
    hosts = draw(st.integers(1, 12))
    racks = draw(st.integers(1, hosts))
    domains = [f"rack{draw(st.integers(0, racks - 1))}" for _ in range(hosts)]
    copies = count_copies(draw(st.one_of(st.none(), st.integers(1, 5))), domains)
    sizes = draw(st.lists(st.integers(0, 1000), max_size=30))
    bound = draw(st.integers(0, min(3, len(sizes))))
    return names(hosts), domains, copies, sizes, [0] * bound


@given(layouts())
def test_each_file_lies_in_as_many_domains_as_wanted(layout):
    hosts, domains, copies, sizes, bound = layout
    placed = place_files(sizes, hosts, domains, copies, bound)
    assert placed == place_files(sizes, hosts, domains, copies, bound)
    for number, holders in enumerate(placed):
        assert len({domains[host] for host in holders}) == len(holders) == copies
        assert list(holders) == sorted(holders)
        assert 0 in holders or number >= len(bound)


@pytest.mark.parametrize("hosts", range(1, 18))
@pytest.mark.parametrize("copies", [1, 2, 3, None])
def test_all_hosts_hold_as_much(hosts, copies):
    domains = names(hosts)
    count = count_copies(copies, domains)
    shares = count_shares(hosts, count)
    assert shares * count >= 2 * hosts or count == hosts
    placed = place_files([100] * shares, domains, domains, count)
    assert loads([100] * shares, placed, hosts) == [100 * shares * count // hosts] * hosts


@given(st.lists(st.integers(90, 110), min_size=16, max_size=16))
def test_about_equal_shares_give_about_equal_loads(sizes):
    hosts = names(16)
    found = loads(sizes, place_files(sizes, hosts, hosts, 2), 16)
    assert max(found) <= 1.1 * sum(found) / 16


def test_two_lost_hosts_of_sixteen_mostly_lose_nothing():
    hosts = names(16)
    placed = place_files([100] * count_shares(16, 2), hosts, hosts, 2)
    fatal = [pair for pair in combinations(range(16), 2) if pair in placed]
    # At random, each of the 16 shares would have a pair of its own.
    assert len(fatal) == 8


def test_a_domain_that_has_most_hosts_cannot_hold_two_copies():
    domains = ["a", "a", "a", "b"]
    placed = place_files([10] * 8, names(4), domains, 2)
    assert all(3 in holders for holders in placed)
    assert loads([10] * 8, placed, 4) == [30, 30, 20, 80] or sorted(
        loads([10] * 8, placed, 4)
    ) == [20, 30, 30, 80]


def test_copies_are_at_most_the_domains():
    assert count_copies(3, ["a", "a", "b"]) == 2
    assert count_copies(None, ["a", "a", "b"]) == 2
    assert count_copies(1, ["a", "b"]) == 1


def test_many_hosts_are_placed_in_a_moment():
    hosts = names(12_500)
    placed = place_files([100] * count_shares(12_500, 2), hosts, hosts, 2)
    assert len(placed) == 12_500


@given(layouts(), st.data())
def test_what_a_host_has_alone_lies_on_it_and_in_other_domains(layout, data):
    hosts, domains, copies, _, _ = layout
    owners = data.draw(st.lists(st.sampled_from(range(len(hosts))), unique=True))
    placed = place_own_files(owners, hosts, domains, copies)
    assert placed == place_own_files(owners, hosts, domains, copies)
    for owner, holders in zip(owners, placed, strict=True):
        assert owner in holders
        assert len({domains[host] for host in holders}) == len(holders) == copies
        assert list(holders) == sorted(holders)


@pytest.mark.parametrize("hosts", range(1, 18))
@pytest.mark.parametrize("copies", [1, 2, 3, None])
def test_each_host_gets_files_of_as_many_hosts_as_it_sends_to(hosts, copies):
    domains = names(hosts)
    count = count_copies(copies, domains)
    placed = place_own_files(range(hosts), domains, domains, count)
    assert loads([1] * hosts, placed, hosts) == [count] * hosts


def test_racks_of_one_size_get_as_much_on_each_host():
    racks = [f"rack{host // 4}" for host in range(16)]
    placed = place_own_files(range(16), names(16), racks, 2)
    assert loads([1] * 16, placed, 16) == [2] * 16


def test_two_lost_hosts_of_sixteen_mostly_lose_no_part():
    hosts = names(16)
    placed = place_own_files(range(16), hosts, hosts, 2)
    assert len(set(placed)) == 8
    # The same pairs as those of shares: together they lose no more.
    assert set(placed) == set(place_files([100] * count_shares(16, 2), hosts, hosts, 2))


@given(layouts())
def test_no_host_has_two_files_in_a_turn(layout):
    hosts, domains, copies, _, _ = layout
    holders = place_own_files(range(len(hosts)), hosts, domains, copies)
    turns = order_turns_of_files(holders)
    for (a, one), (b, other) in combinations(zip(turns, holders, strict=True), 2):
        assert a != b or not set(one) & set(other)


def test_files_of_many_hosts_take_few_turns():
    hosts = names(12_500)
    holders = place_own_files(range(12_500), hosts, hosts, 2)
    assert max(order_turns_of_files(holders)) == 1
