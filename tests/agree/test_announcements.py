# SPDX-License-Identifier: Apache-2.0
"""What busy ranks announce, over a simulated network of up to 4,096 ranks that wait."""

import math
import random
import time
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mpi4py")

from mpi_ckpt.comm import busy
from mpi_ckpt.comm.busy import BusyRanks, Occupation
from mpi_ckpt.comm.liveness import Patience


class Done:
    """A request that is done."""

    def Test(self):
        return True


class Rank:
    """The communicator of one rank, and its handle."""

    is_open = True
    deadline_seconds = 600.0

    def __init__(self, network, rank):
        self.network, self.rank, self.size = network, rank, network.size
        self.handle, self.visible = self, {}
        self.inbox = deque()
        self.sent = 0
        self.hosts = ["host"] * self.size

    def can_meet(self):
        return True

    def Iprobe(self, source, tag, status):
        from mpi4py import MPI

        if self.inbox:
            status.source = self.inbox[0][0]
            status.Set_elements(MPI.BYTE, len(self.inbox[0][1]))
        return bool(self.inbox)

    def Recv(self, room, source, tag):
        sender, letter = self.inbox.popleft()
        assert (sender, len(letter)) == (source, len(room))
        room[:] = letter

    def Isend(self, letter, to, tag):
        self.sent += 1
        self.network.ranks[to].inbox.append((self.rank, letter.copy()))
        self.network.awake.append(to)
        return Done()


class Network:
    """Ranks of which some wait and pass on what they hear; the others hear nothing."""

    def __init__(self, size, *, seed=0):
        self.size, self.random = size, random.Random(seed)
        self.awake, self.deaf = [], set()
        self.ranks = [Rank(self, rank) for rank in range(size)]
        self.busy = [BusyRanks(rank) for rank in self.ranks]

    def begin(self, rank, reason="training"):
        self.deaf.add(rank)
        self.busy[rank].announce(Occupation.begin(reason, 3600))

    def end(self, rank):
        self.busy[rank].announce(busy._ENDED)
        self.deaf.discard(rank)
        self.awake.append(rank)

    def settle(self):
        """Let all that wait hear all that there is to hear."""
        while self.awake:
            at = self.random.randrange(len(self.awake))
            self.awake[at], self.awake[-1] = self.awake[-1], self.awake[at]
            rank = self.awake.pop()
            if rank not in self.deaf and self.ranks[rank].inbox:
                self.busy[rank].listen()

    def known(self, rank):
        return set(self.busy[rank]._heard)


def test_all_of_4096_waiting_ranks_hear_of_a_busy_one_with_few_messages():
    network = Network(4096)
    network.begin(1234, "writing VTK")
    network.settle()
    assert all(network.known(rank) == {1234} for rank in range(4096) if rank != 1234)
    assert "writing VTK" in network.busy[4000].describe()[0]
    network.end(1234)
    network.settle()
    assert not any(network.known(rank) for rank in range(4096))
    # A letter to 2 log2 N neighbours for each news; all pairs would be N - 1.
    assert max(rank.sent for rank in network.ranks) <= 4 * math.log2(4096)


def test_what_has_ended_before_anyone_listens_is_not_passed_on():
    network = Network(4096)
    for rank in range(4096):
        network.begin(rank)
        network.end(rank)
    network.settle()
    assert not any(network.known(rank) for rank in range(4096))
    assert max(rank.sent for rank in network.ranks) <= 4 * math.log2(4096)


def test_a_rank_keeps_few_busy_ranks_in_mind_but_waits_for_the_last_one(monkeypatch):
    monkeypatch.setattr(busy, "_KNOWN_MAX", 8)
    size, first = 128, 64
    network = Network(size)
    for rank in range(first, size):
        network.begin(rank)
        network.settle()
    for rank in range(first):
        assert 0 < len(network.known(rank)) <= 8 + 2 * math.log2(size)
    for rank in range(first, size - 1):
        network.end(rank)
        network.settle()
    assert all(network.known(rank) == {size - 1} for rank in range(size - 1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 150),
    st.lists(st.tuples(st.integers(0, 149), st.booleans()), max_size=25),
    st.integers(0, 99),
)
def test_in_the_end_all_know_who_is_busy(size, steps, seed):
    network = Network(size, seed=seed)
    for drawn, is_heard in steps:
        rank = drawn % size
        if rank in network.deaf:
            network.end(rank)
        elif len(network.deaf) < size - 1:
            network.begin(rank)
        if is_heard:
            network.settle()
    is_busy = set(network.deaf)
    network.settle()
    # Busy ranks pass nothing on, but a few of them do not cut the others off.
    if len(is_busy) <= 3 or size <= 32:
        for rank in set(range(size)) - is_busy:
            assert network.known(rank) == is_busy


def test_the_time_on_the_way_counts(monkeypatch):
    network = Network(64)
    network.begin(0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    network.settle()  # each has listened last 10 s ago, and the wall clock goes on alone
    said = network.busy[33]._heard[0].occupation
    assert 0 <= said.seconds < 10.5
    assert network.busy[33].excuse(Patience(1), 0.5, "testing")
    monkeypatch.setattr(time, "monotonic", lambda: now + 4000)
    assert not said.is_believed
