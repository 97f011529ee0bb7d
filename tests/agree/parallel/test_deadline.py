# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not come: every other one says who, and goes no further."""

import gc
import os
import re
import socket
import time

import numpy as np
import pytest

from mpi_ckpt import ArrayState
from mpi_ckpt.comm import (
    agree,
    bcast_buffers,
    bcast_bytes,
    communicator,
    gather_bytes,
    liveness,
)
from mpi_ckpt.errors import CollectiveError, SaveError
from mpi_ckpt.failures import name_ranks
from mpi_ckpt.integrations import horovod
from mpi_ckpt.integrations.horovod import parameters
from tests.ranks import coming_late, manager, same_error
from tests.waiting import limit

# A session of their own: what leaves a communicator behind on which ranks disagree has no
# guarantee of MPI's, and Open MPI's memory is at times no longer sound after it.
pytestmark = pytest.mark.long

HOST = socket.gethostname()
DEADLINE = 0.2
# Of a wait that must not be for ever; what a busy machine takes says nothing.
SOON_SECONDS = limit(20)


@pytest.fixture
def broken_ones():
    """Communicators that are never freed: whoever was absent would be waited for."""
    return []


@pytest.fixture
def short_roll_call(monkeypatch):
    # What those who came may be apart, on a busy machine.
    monkeypatch.setattr(liveness, "_ROLL_CALL_SECONDS", 2.5)


@pytest.fixture
def make(peers, broken_ones):
    def make():
        tested = communicator.Communicator(peers, deadline_seconds=35)
        broken_ones.append(tested)
        tested.deadline_seconds = DEADLINE
        return tested

    return make


def meet(tested):
    """Post an allreduce and wait for it; return the error."""
    with pytest.raises(CollectiveError) as caught:
        tested.all_reduce(np.ones(4), "sum", "meeting")
    return str(caught.value)


def named(ranks, size):
    return ", ".join(f"rank {rank} on {HOST}" for rank in ranks) + f" of {size}"


def test_a_late_rank_is_named_by_all_others(peers):
    tested = communicator.Communicator(peers, deadline_seconds=35)
    tested.deadline_seconds = 1
    late = peers.size - 1
    start = time.monotonic()
    with coming_late(peers, late):
        text = meet(tested)
    assert 1 <= time.monotonic() - start < SOON_SECONDS
    again = meet(tested)
    # What each sees of the late one is its own; what is known to all comes first.
    others = peers.allgather(again.partition("\n")[0])[:late]
    if peers.rank == late:
        assert "the others gave up waiting for this rank" in text
    else:
        expected = f"meeting: {named([late], peers.size)} did not arrive within 1 s"
        assert text.startswith(expected)
        assert "published generations are untouched" in text
    assert again.startswith("meeting: ranks cannot meet any more on this communicator: ")
    reason = "the others gave up" if peers.rank == late else named([late], peers.size)
    assert reason in again
    assert len(set(others)) == 1
    tested.close()


def test_what_is_known_of_a_late_rank_is_told(peers, make, short_roll_call):
    tested = make()
    processes = peers.allgather(os.getpid())
    # The first meeting takes place, however busy the machine is; the second does not.
    tested.deadline_seconds = 35
    assert tested.all_reduce(np.ones(1), "sum", "training")[0] == peers.size
    tested.deadline_seconds = DEADLINE
    late = peers.size - 1
    with coming_late(peers, late):
        text = meet(tested)
    last_met = r"; all ranks last met \d+ s ago \(for: training\)"
    if peers.rank == late:
        assert re.search(f"the others gave up waiting for this rank{last_met}; ", text)
    else:
        seen = rf"rank {late} on {HOST}: process {processes[late]} (is|waits)[^;]*"
        assert re.fullmatch(seen + last_met, text.splitlines()[1].strip())


def test_a_process_on_another_host_is_not_looked_for(
    peers, make, on_hosts, short_roll_call
):
    on_hosts([f"h{rank}" for rank in range(peers.size)])
    tested = make()
    late = peers.size - 1
    with coming_late(peers, late):
        text = meet(tested)
    if peers.rank != late:
        assert text.splitlines()[1:] == [f"  rank {late} on h{late}"]


@pytest.mark.parametrize("absent", ["root", "all but root"])
def test_exactly_the_absent_are_named(peers, make, short_roll_call, absent):
    ranks = list(range(peers.size))
    gone = {"root": ranks[:1], "all but root": ranks[1:]}[absent]
    tested = make()
    with coming_late(peers, *gone):
        text = meet(tested)
    if peers.rank in gone:
        assert "the others gave up waiting for this rank" in text
    else:
        assert f"{named(gone, peers.size)} did not arrive within 0.2 s" in text


def test_a_rank_that_does_not_even_begin(peers, broken_ones, short_roll_call):
    late = peers.size - 1
    with coming_late(peers, late), pytest.raises(CollectiveError) as caught:
        broken_ones.append(communicator.Communicator(peers, deadline_seconds=DEADLINE))
    if peers.rank != late:
        told = f"not all of the {peers.size} ranks arrived within 0.2 s; this is rank "
        assert f"meeting for the first time: {told}{peers.rank}" in str(caught.value)


def test_a_rank_that_does_not_come_to_a_broadcast(peers, monkeypatch, short_roll_call):
    late = peers.size - 1
    given = {"w": np.full(4, peers.rank)}
    real = parameters.sync_states

    def sync(comm, *arguments, **options):
        comm.deadline_seconds = DEADLINE
        with coming_late(peers, late):
            return real(comm, *arguments, **options)

    monkeypatch.setattr(parameters, "sync_states", sync)
    with pytest.raises(CollectiveError) as caught:
        horovod.broadcast_parameters(given, deadline_seconds=35)
    told = "the others gave up" if peers.rank == late else f"rank {late} on "
    assert told in str(caught.value)
    assert given["w"].tolist() == [peers.rank] * 4


def send(tested, contents):
    bcast_buffers(tested, [memoryview(contents)], "sending")
    # Who only sends may be done with that.
    agree(tested, "sending", int, error=SaveError)


def test_every_kind_of_wait_ends(peers, make, short_roll_call):
    calls = {
        "sending": lambda tested: send(tested, bytearray(5 << 20)),
        "gathering": lambda tested: gather_bytes(tested, bytes(3 << 20), "gathering"),
    }
    ones = {doing: make() for doing in calls}
    late = peers.size - 1
    texts = []
    with coming_late(peers, late):
        for doing, call in calls.items():
            try:
                call(ones[doing])
            except CollectiveError as error:
                texts.append(str(error))
    on_root = peers.bcast(texts)
    expected = f"{named([late], peers.size)} did not arrive within 0.2 s"
    assert [text.partition(";")[0] for text in on_root] == [
        f"{doing}: {expected}" for doing in calls
    ]


@pytest.mark.parametrize("hosts", ["abcd", "abab", "aabb"])
def test_a_chain_that_misses_a_rank(peers, make, on_hosts, short_roll_call, hosts):
    hosts = hosts[: peers.size]
    on_hosts(hosts)
    for late in range(peers.size):
        tested = make()
        contents = np.full(5 << 20, peers.rank, np.uint8)
        with coming_late(peers, late), pytest.raises(CollectiveError) as caught:
            send(tested, contents)
        texts = peers.allgather(str(caught.value).partition(";")[0])
        refusal = texts.pop(late)
        assert "the others gave up waiting for this rank" in refusal
        gone = f"rank {late} on {hosts[late]} of {peers.size}"
        assert set(texts) == {f"sending: {gone} did not arrive within 0.2 s"}
        tested.close()
        assert tested.handle  # not freed: that would have waited


def test_results_that_come_late_go_nowhere(peers, make, short_roll_call):
    tested = make()
    with coming_late(peers, peers.size - 1):
        meet(tested)
    gc.collect()  # what the traceback still held
    fresh = [np.zeros(4) for _ in range(2000)]
    # The late rank has posted its part by now, so MPI finishes what was given up: into
    # memory that must not belong to anybody else yet.
    for _ in range(50):
        peers.barrier()
    assert not any(array.any() for array in fresh)


def test_a_rank_that_closes_without_meeting_does_not_wait(peers, make, short_roll_call):
    tested = make()
    late = peers.size - 1
    with coming_late(peers, late):
        if peers.rank != late:
            meet(tested)
    start = time.monotonic()
    tested.close()
    assert time.monotonic() - start < SOON_SECONDS


def test_a_save_to_which_a_rank_does_not_come(peers, shared_path, short_roll_call):
    arrays = {"x": np.arange(5.0)}
    late = peers.size - 1
    with manager(shared_path, ArrayState("a", arrays)) as checkpoints:
        checkpoints.save()
        checkpoints._session.comm.deadline_seconds = DEADLINE
        with coming_late(peers, late), pytest.raises(CollectiveError) as caught:
            checkpoints.save()
        with pytest.raises(CollectiveError, match="cannot meet any more"):
            checkpoints.restore()
    text = peers.bcast(str(caught.value))
    assert named([late], peers.size) in text
    arrays["x"][:] = 0
    with manager(shared_path, ArrayState("a", arrays)) as checkpoints:
        assert checkpoints.restore().generation == 1
        assert [info.generation for info in checkpoints.generations()] == [1]
    assert arrays["x"].tolist() == [0, 1, 2, 3, 4]


def test_ranks_that_do_different_things_are_told(peers, make_communicator):
    tested = make_communicator()
    last = peers.size - 1
    doing = "loading" if peers.rank == last else "saving"
    with same_error(
        peers,
        CollectiveError,
        "the ranks do different things; published generations are untouched",
        f"{name_ranks(range(last), tested.hosts)}: saving",
        f"rank {last} on {HOST}: loading",
    ):
        agree(tested, doing, int, error=SaveError)
    assert agree(tested, "going on", int, error=SaveError) == 0


@pytest.mark.parametrize("call", ["sync", "restore", "step", "generations"])
def test_a_save_on_root_alone_is_told(peers, shared_path, call):
    with manager(shared_path, ArrayState("a", {"x": np.arange(5.0)})) as checkpoints:
        with same_error(peers, CollectiveError, "the ranks do different things"):
            getattr(checkpoints, "save" if peers.rank == 0 else call)()
        assert checkpoints.save().generation == 1


def test_no_progress_though_all_are_there(peers, make):
    tested = make()
    # Everybody waits for everybody, and nobody sends.
    into = np.zeros(1, np.uint8)
    with same_error(peers, CollectiveError, "they disagree about what comes next"):
        tested.wait([tested.irecv(into, rank) for rank in range(peers.size)], "waiting")
    with pytest.raises(CollectiveError, match="cannot meet any more"):
        tested.all_reduce(np.ones(1), "max", "meeting")


def test_what_mpi_cannot_do_breaks_the_communicator(comm):
    tested = communicator.Communicator(comm, deadline_seconds=35)
    sent = tested.isend(np.ones(100, np.uint8), tested.rank)
    with pytest.raises(CollectiveError, match="sending to myself: MPI failed: "):
        tested.wait(
            [tested.irecv(np.zeros(10, np.uint8), tested.rank), sent], "sending to myself"
        )
    with pytest.raises(CollectiveError, match=r"cannot meet any more.*MPI failed"):
        tested.all_reduce(np.ones(1), "max", "meeting")


def test_a_rank_alone_never_waits(comm):
    alone = communicator.Communicator(
        comm if comm.size == 1 else type(comm)(comm_self()), deadline_seconds=1e-9
    )
    for _ in range(10):
        assert alone.all_reduce(np.ones(1), "sum", "meeting")[0] == 1
        assert bcast_bytes(alone, b"x" * 1000, "sending") == b"x" * 1000
        assert gather_bytes(alone, b"y", "gathering") == [b"y"]
    alone.close()


def comm_self():
    from mpi4py import MPI

    return MPI.COMM_SELF


def test_a_slow_rank_within_the_deadline_is_waited_for(comm, make_communicator):
    tested = make_communicator()
    if comm.rank == comm.size - 1:
        time.sleep(0.3)
    with same_error(comm, SaveError, "too late"):
        agree(tested, "working", lambda: int("too late"), error=SaveError)
    assert tested.all_reduce(np.ones(1), "sum", "meeting")[0] == comm.size
