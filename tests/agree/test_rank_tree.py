# SPDX-License-Identifier: Apache-2.0
"""Bytes and findings of up to 100,000 simulated ranks, on their way through the tree."""

import math
import random
from collections import defaultdict, deque
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mpi4py")

from mpi_ckpt.comm.agreement import _differences
from mpi_ckpt.comm.dealing_out import _Dealer, _take
from mpi_ckpt.comm.rank_tree import (
    TOGETHER_BYTES,
    Parcel,
    gather_bytes,
    gather_findings,
    scatter_bytes,
)
from mpi_ckpt.comm.roster import branch_of, children_of, parent_of


class Done:
    """A request that is done."""

    def Test(self):
        return True


class Network:
    """Ranks that run one after the other: each finds the messages of those before it.

    Attributes:
        sent, received: Messages by rank.
        through: Bytes by rank that came to it.
    """

    def __init__(self, size, message_bytes=8 << 20):
        self.size, self.message_bytes = size, message_bytes
        self.mail = defaultdict(deque)
        self.sent, self.received, self.through = [0] * size, [0] * size, [0] * size

    def run(self, call, *, upwards):
        """Return what each rank's call returns."""
        ranks = range(self.size)
        found = {
            rank: call(Rank(self, rank)) for rank in (ranks[::-1] if upwards else ranks)
        }
        assert not any(self.mail.values()), "a message was not received"
        return [found[rank] for rank in ranks]


class Rank:
    """The communicator of one rank, and its handle."""

    root = 0

    def __init__(self, network, rank):
        self.network, self.rank, self.size = network, rank, network.size
        self.message_bytes, self.handle = network.message_bytes, self

    def Iprobe(self, source, tag, status):
        from mpi4py import MPI

        box = self.network.mail[source, self.rank]
        if box:
            status.Set_elements(MPI.BYTE, len(box[0]))
        return bool(box)

    def Irecv(self, room, source, tag):
        data = self.network.mail[source, self.rank].popleft()
        assert len(data) == len(room)
        room[:] = data
        self.network.received[self.rank] += 1
        self.network.through[self.rank] += len(data)
        return Done()

    def Isend(self, data, to, tag):
        assert len(data) <= self.message_bytes
        self.network.mail[self.rank, to].append(data.copy())
        self.network.sent[self.rank] += 1
        return Done()

    def wait(self, requests, doing, *, streaming=False, buffers=None):
        for request in requests:
            for _ in range(3):
                if request.Test():
                    break
            else:
                raise AssertionError(f"rank {self.rank} waits for ever")


def gathered(network, parts):
    return network.run(
        lambda comm: gather_bytes(comm, parts[comm.rank], "testing"), upwards=True
    )


def scattered(network, parts, window_bytes=1 << 20):
    return network.run(
        lambda comm: scatter_bytes(
            comm, parts if comm.rank == 0 else [], "testing", window_bytes=window_bytes
        ),
        upwards=False,
    )


@given(st.integers(1, 5000), st.data())
def test_each_rank_but_root_has_one_parent(size, data):
    rank = data.draw(st.integers(0, size - 1))
    parent = parent_of(rank)
    assert (parent is None) == (rank == 0)
    assert parent is None or rank in children_of(parent, size)
    below = [each for child in children_of(rank, size) for each in branch_of(child, size)]
    assert [rank, *below] == list(branch_of(rank, size))
    assert len(children_of(rank, size)) <= math.ceil(math.log2(max(2, size)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.sampled_from([64, 1000, 8 << 20]),
    st.sampled_from([10, 20_000, 100_000]),
    st.integers(0, 99),
)
def test_all_bytes_arrive_whatever_their_lengths(size, message_bytes, most, seed):
    drawn = random.Random(seed)
    parts = [drawn.randbytes(drawn.choice([0, drawn.randrange(most)])) for _ in range(size)]
    assert gathered(Network(size, message_bytes), parts) == [parts, *[[]] * (size - 1)]
    assert scattered(Network(size, message_bytes), parts, most) == parts


@pytest.mark.parametrize("nbytes", [0, 45, 3000])
def test_thousands_of_ranks_send_few_messages_each(nbytes):
    size = 4096
    parts = [bytes([rank % 251]) * nbytes for rank in range(size)]
    rounds = math.log2(size)
    up, down = Network(size), Network(size)
    assert gathered(up, parts)[0] == parts
    assert scattered(down, parts) == parts
    # What comes apart is full, or the bytes of one rank and full messages of others.
    apart = 2 * size * (nbytes + 16) / TOGETHER_BYTES
    for network in (up, down):
        assert max(network.sent[1:]) <= rounds + 2
        assert max(network.received[1:]) <= rounds + 1
        assert max(network.through[1:]) <= (rounds + 1) * TOGETHER_BYTES + nbytes
    assert up.received[0] <= rounds + apart
    assert down.sent[0] <= rounds + apart


def dealt(network, parts, turns, window_bytes):
    def deal_here(comm):
        if comm.rank:
            return _take(comm, "dealing")
        dealer = _Dealer(comm, "dealing", window_bytes)
        dealer.deal(iter(turns))
        return dealer.outcome()

    return network.run(deal_here, upwards=False)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.sampled_from([64, 8 << 20]),
    st.sampled_from([10, 20_000, 200_000]),
    st.sampled_from([1, 1000, 1 << 20]),
    st.integers(0, 99),
)
def test_dealt_bytes_arrive_in_any_order(size, message_bytes, most, window_bytes, seed):
    drawn = random.Random(seed)
    parts = [drawn.randbytes(drawn.choice([0, drawn.randrange(most)])) for _ in range(size)]
    ranks = drawn.sample(range(size), drawn.randint(0, size))
    turns = [([rank], parts[rank]) for rank in ranks]
    found = dealt(Network(size, message_bytes), parts, turns, window_bytes)
    assert found == [part if rank in ranks else b"" for rank, part in enumerate(parts)]


@pytest.mark.parametrize(("nbytes", "most"), [(100, 300), (10_000, 800)])
def test_root_deals_small_bytes_out_in_few_messages(nbytes, most):
    size = 4096
    network = Network(size)
    parts = [bytes([rank % 251]) * nbytes for rank in range(size)]
    turns = [([rank], part) for rank, part in enumerate(parts)]
    assert dealt(network, parts, turns, 64 << 20) == parts
    assert network.sent[0] < most
    assert max(network.sent[1:]) == 15


def test_what_many_ranks_find_differently_is_bounded():
    size = 16_384
    network = Network(size)
    found = network.run(
        lambda comm: gather_findings(
            comm, comm.rank.to_bytes(16, "big"), "x" * 10_000, "testing"
        ),
        upwards=True,
    )
    assert [ranks for _, ranks in found[0]] == [[rank] for rank in range(size)]
    assert [bool(text) for text, _ in found[0]] == [True] * 17 + [False] * (size - 17)
    assert found[1] == []
    assert max(network.received) == 14
    # The texts of 17 from each child, and a key and a number of each rank.
    assert max(network.through) < 14 * 17 * 11_000 + 60 * size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=90))
def test_findings_are_those_of_the_lowest_ranks(said):
    texts = ["" if one == 0 else f"finding {one}" for one in said]
    found = Network(len(said)).run(
        lambda comm: gather_findings(
            comm, texts[comm.rank].encode(), f"{texts[comm.rank]} of {comm.rank}", "testing"
        ),
        upwards=True,
    )[0]
    by_key = {}
    for rank, text in enumerate(texts):
        if text:
            by_key.setdefault(text, []).append(rank)
    assert [ranks for _, ranks in found] == list(by_key.values())
    assert [text for text, _ in found][:17] == [
        f"{key} of {ranks[0]}" for key, ranks in by_key.items()
    ][:17]


def test_of_many_lists_that_differ_the_first_are_shown_and_all_are_counted():
    size = 64
    found = Network(size).run(
        lambda comm: gather_findings(
            comm, bytes([comm.rank]), f'["{comm.rank}"]', "testing"
        ),
        upwards=True,
    )[0]
    comm = SimpleNamespace(hosts=["host"] * size)
    lines = _differences(comm, found)
    assert len(lines) == 17
    assert lines[0] == "rank 1 on host has ['1'], root has ['0']"
    assert lines[-1] == "and 47 more"
    assert _differences(comm, []) == []


def test_a_parcel_comes_as_it_was_sent():
    behind = [Parcel.of(4, b"abc"), Parcel.of(5, b"x").note()]
    parcel = Parcel.of(3, b"", behind)
    encoded = parcel.encode()
    assert len(encoded) == parcel.nbytes
    assert Parcel.decode(encoded) == parcel
