# SPDX-License-Identifier: Apache-2.0
"""The roll call over a simulated network of up to 4,096 ranks."""

from __future__ import annotations

import math
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_ckpt.comm.gossip import RollCall, is_passed_on, neighbours_of, spread


class Network:
    """Ranks that call the roll, each by the library's own loop, on one thread.

    A rank runs until it has nothing to hear; a message wakes it. Messages to a rank that is
    absent, or still waits, stay unread: a waiting rank gives up when the first one arrives.
    """

    def __init__(self, size, absent=(), *, seed=0, leaver=None):
        self.size, self.absent = size, set(absent)
        self.random = random.Random(seed)
        self.inbox = [deque() for _ in range(size)]
        self.sent = [0] * size
        self.calls = {}
        self.awake = []
        self.leaver = leaver

    def post(self, source, ranks, words):
        self.sent[source] += len(ranks)
        for rank in ranks:
            self.inbox[rank].append(words)
            if rank not in self.absent:
                self.awake.append(rank)

    def give_up(self, rank):
        seen = self.leaver if self.leaver in neighbours_of(rank, self.size) else None
        self.calls[rank] = call = RollCall(rank, self.size, bytes([rank % 251] * 16), seen)
        self.post(rank, call.neighbours, call.encode())

    def listen(self, rank):
        inbox = self.inbox[rank]
        spread(
            self.calls[rank],
            lambda ranks, words: self.post(rank, ranks, words),
            lambda: inbox.popleft() if inbox else None,
            lambda: self.calls[rank].is_complete,
            lambda has_news: True,
        )

    def run(self, first):
        self.give_up(first)
        while self.awake:
            at = self.random.randrange(len(self.awake))
            self.awake[at], self.awake[-1] = self.awake[-1], self.awake[at]
            rank = self.awake.pop()
            if rank not in self.calls:
                self.give_up(rank)
            if self.inbox[rank]:
                self.listen(rank)
        return self.calls


def check(network):
    present = set(range(network.size)) - network.absent
    assert set(network.calls) == present, "every rank that is here has given up"
    for call in network.calls.values():
        assert call.absent == sorted(network.absent)
        assert call.is_complete == (not network.absent)
        if 0 in present:
            assert call.words_of_root == bytes(16)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.data())
def test_all_live_ranks_know_the_same_absent_ones(size, data):
    most = min(size - 1, 3 if is_passed_on(size) else size - 1)
    absent = data.draw(st.sets(st.integers(0, size - 1), max_size=most))
    first = data.draw(st.sampled_from(sorted(set(range(size)) - absent)))
    network = Network(size, absent, seed=data.draw(st.integers(0, 9)))
    network.run(first)
    check(network)


@pytest.mark.parametrize(
    ("size", "absent"),
    [
        (4096, range(64, 128)),
        (1024, ()),
        (1024, (0,)),
        (1024, range(256)),
        (1024, range(0, 1024, 128)),
    ],
    ids=["a host", "nobody", "root", "a quarter in a row", "every 128th"],
)
def test_thousands_of_ranks_agree_with_few_messages(size, absent):
    network = Network(size, absent)
    network.run(size // 2 + 1)
    check(network)
    # To 2 log2 N neighbours at each of some rounds of news; all pairs would be N - 1.
    present = size - len(absent)
    assert sum(network.sent) / present <= 30 * math.log2(size)
    assert max(network.sent) <= 80 * math.log2(size)


def test_every_second_rank_absent_does_not_cut_the_others_off():
    network = Network(1024, range(1, 1024, 2))
    network.run(0)
    check(network)


def test_absent_ranks_without_a_live_neighbour_are_informed_by_one_rank_each():
    size, live = 256, {0, 3, 200}
    informed = []
    for rank in live:
        call = RollCall(rank, size)
        for other in live:
            call.merge(RollCall(other, size).encode())
        informed += call.to_inform()
    reached = {n for rank in live for n in neighbours_of(rank, size)}
    assert sorted(informed) == sorted(set(range(size)) - live - reached)
    assert len(informed) == len(set(informed))


def test_a_rank_that_has_left_is_known_to_all():
    network = Network(300, leaver=7)
    network.run(150)
    assert {call.leaver for call in network.calls.values()} == {7}


@given(st.integers(1, 5000), st.data())
def test_neighbours_are_mutual_and_few(size, data):
    rank = data.draw(st.integers(0, size - 1))
    neighbours = neighbours_of(rank, size)
    assert rank not in neighbours
    assert len(neighbours) <= max(31, 2 * math.ceil(math.log2(max(2, size))))
    for other in neighbours[:5]:
        assert rank in neighbours_of(other, size)
