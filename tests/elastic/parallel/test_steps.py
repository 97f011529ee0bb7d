# SPDX-License-Identifier: Apache-2.0
"""What the ranks agree on at a step travels while they train."""

import gc
import socket
import threading
import time
from datetime import timedelta

import numpy as np
import pytest

from mpi_ckpt import AutoInterval, ObjectState
from mpi_ckpt.comm import Vote, liveness
from mpi_ckpt.engine.steps import interval, stepping
from mpi_ckpt.errors import CollectiveError
from mpi_ckpt.options import IO
from mpi_ckpt.storage import filesystem
from tests.ranks import (
    RecordingHandle,
    assert_same,
    coming_late,
    manager,
    same_error,
)

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """Votes are read a step later, however slow the machine is."""
    monkeypatch.setattr(stepping, "_LONG_STEP_SECONDS", 1e9)


@pytest.fixture
def counter():
    return ObjectState("counter", 0)


def take_steps(checkpoints, count):
    for _ in range(count):
        checkpoints.step()


def numbers(checkpoints):
    return [info.generation for info in checkpoints.generations()]


def test_flags_of_all_ranks_meet(comm, make_communicator):
    vote = Vote(make_communicator(), "voting")
    assert not vote.is_posted
    for turn in range(5):
        mine = 1 << (comm.rank + turn)
        everyone = sum(1 << (rank + turn) for rank in range(comm.size))
        if turn % 2:
            assert vote.exchange(mine).flags == everyone
        else:
            vote.post(mine)
            assert vote.is_posted
            assert vote.take().flags == everyone
        assert not vote.is_posted
    assert vote.exchange(1 << 63).flags == 1 << 63


def test_digests_of_all_ranks_are_compared_in_the_same_message(comm, make_communicator):
    vote = Vote(make_communicator(), "voting")
    assert vote.exchange(0, b"0123456789abcdef").is_alike
    assert vote.exchange(0).is_alike
    for culprit in range(comm.size):
        for bit in (0, 127):
            mine = (1 << bit if comm.rank == culprit else 0).to_bytes(16, "little")
            assert vote.exchange(0, mine).is_alike == (comm.size == 1)


def test_a_posted_vote_waits_for_nobody(peers, make_communicator):
    vote = Vote(make_communicator(), "voting")
    peers.barrier()
    if peers.rank == 0:
        vote.post(1)
        peers.barrier()
    else:
        peers.barrier()  # root has posted, and was not held up by those who had not
        vote.post(2)
    assert vote.take().flags == 3


def test_votes_of_forgotten_managers_go_nowhere(peers, make_communicator):
    communicator = make_communicator()
    vote = Vote(communicator, "voting")
    if peers.rank < peers.size - 1:
        vote.post(255)
    alive = vote if peers.rank == peers.size - 1 else None
    del vote
    gc.collect()
    fresh = [np.zeros(5, np.uint64) for _ in range(2000)]
    peers.barrier()
    if alive is not None:
        alive.post(255)
    for _ in range(50):
        peers.barrier()
    assert not any(array.any() for array in fresh)
    # What is under way is matched before the communicator is freed.
    assert communicator.all_reduce(np.ones(1), "sum", "meeting")[0] == peers.size


def test_a_step_is_one_small_message(comm, shared_path, counter):
    with manager(shared_path, counter, interval=1000) as checkpoints:
        checkpoints.step()
        with RecordingHandle(checkpoints._session.comm) as recorded:
            for _ in range(10):
                checkpoints.step()
        assert recorded.messages == [("Iallreduce", 56)] * 10


def test_steps_that_save_by_their_number_ask_nobody(comm, shared_path, counter):
    with manager(shared_path, counter, interval=2) as checkpoints:
        for _ in range(4):
            checkpoints.step()
        # At the very step, not a step later.
        assert [info.step for info in checkpoints.generations()] == [2, 4]


def test_what_is_due_by_roots_clock_is_saved_once(comm, shared_path, counter):
    with manager(shared_path, counter, interval=timedelta(hours=1)) as checkpoints:
        checkpoints.step()
        if comm.rank == 0:
            checkpoints._steps._interval._saved_at -= 3601
        checkpoints.step()
        assert numbers(checkpoints) == []
        checkpoints.step()
        assert numbers(checkpoints) == [1]
        for _ in range(5):
            checkpoints.step()
        assert numbers(checkpoints) == [1]


def test_a_save_of_the_users_is_as_good_as_the_one_that_was_due(comm, shared_path, counter):
    with manager(shared_path, counter, interval=timedelta(hours=1)) as checkpoints:
        checkpoints.step()
        if comm.rank == 0:
            checkpoints._steps._interval._saved_at -= 3601
        checkpoints.step()  # posts that a save is due
        checkpoints.save()
        checkpoints.step()
        assert numbers(checkpoints) == [1]


def test_an_old_vote_does_not_hold_up_a_new_save(comm, shared_path, counter, monkeypatch):
    opened = threading.Event()
    real = filesystem.sync_file

    def held(descriptor):
        opened.wait(30)
        real(descriptor)

    monkeypatch.setattr(filesystem, "sync_file", held)
    with manager(shared_path, counter, asynchronous=True) as checkpoints:
        checkpoints.step()  # posts that nothing is being written
        pending = checkpoints.save()
        for _ in range(5):
            checkpoints.step()  # would wait for ever, if it believed that
        assert not pending.finished
        opened.set()
        deadline = time.monotonic() + 30
        while not pending.finished and time.monotonic() < deadline:
            checkpoints.step()
        assert pending.report.generation == 1


def test_everything_else_may_come_between_two_steps(comm, shared_path, counter):
    with manager(shared_path, counter, interval=3) as checkpoints:
        for turn in range(1, 5):
            checkpoints.step()
            counter.value = turn
            checkpoints.save()
            checkpoints.step()
            checkpoints.sync()
            checkpoints.step()
            checkpoints.wait()
            checkpoints.step()
            assert checkpoints.should_stop() is False
            checkpoints.step()
            checkpoints.restore()
            assert_same(comm, (checkpoints.steps, numbers(checkpoints), counter.value))


def test_closing_leaves_nothing_under_way(comm, shared_path, counter):
    for _ in range(20):
        checkpoints = manager(shared_path, counter)
        checkpoints.step()
        checkpoints.close()
        checkpoints.close()


def take_steps_and_fail(shared_path, counter):
    with manager(shared_path, counter) as checkpoints:
        checkpoints.step()
        checkpoints.step()
        raise KeyError


def test_a_manager_left_by_an_exception_leaves_its_vote(comm, shared_path, counter):
    for _ in range(5):
        with pytest.raises(KeyError):
            take_steps_and_fail(shared_path, counter)
    with manager(shared_path, counter) as checkpoints:
        assert checkpoints.save().generation == 1


def test_a_rank_that_comes_to_no_step_is_named(peers, shared_path, counter, monkeypatch):
    monkeypatch.setattr(liveness, "_ROLL_CALL_SECONDS", 2.5)
    late = peers.size - 1
    with manager(shared_path, counter) as checkpoints:
        for _ in range(3):
            checkpoints.step()
        checkpoints._session.comm.deadline_seconds = 0.2
        with coming_late(peers, late), pytest.raises(CollectiveError) as caught:
            take_steps(checkpoints, 2)  # the first only reads the vote of before
        with pytest.raises(CollectiveError, match="cannot meet any more"):
            checkpoints.step()
        # And out of the block, without an error: closing waits for nobody.
    texts = peers.allgather(str(caught.value).partition(";")[0])
    refusal = texts.pop(late)
    assert "the others gave up waiting for this rank" in refusal
    expected = f"step(): rank {late} on {HOST} of {peers.size} did not arrive within 0.2 s"
    assert set(texts) == {expected}


@pytest.mark.parametrize("call", ["save", "restore", "sync", "generations", "should_stop"])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_a_step_on_some_ranks_alone_is_told(peers, shared_path, counter, call, before):
    with manager(shared_path, counter) as checkpoints:
        for _ in range(before):
            checkpoints.step()
        with same_error(peers, CollectiveError, "the ranks do different things"):
            if peers.rank == 0:
                getattr(checkpoints, call)()
            else:
                take_steps(checkpoints, 2)  # the first posts, the second reads
        # All have heard of it: nothing of before is read any more.
        for _ in range(3):
            assert checkpoints.step() is False
        assert checkpoints.save().generation == 1


def test_an_interval_that_is_worked_out(comm, shared_path, counter, monkeypatch):
    monkeypatch.setattr(interval, "_FIRST_SECONDS", 0.05)
    auto = AutoInterval(mtbf=timedelta(seconds=0.1), overhead=0.9)
    with manager(shared_path, counter, interval=auto, io=IO(reuse=False)) as checkpoints:
        deadline = time.monotonic() + 20
        while comm.bcast(len(numbers(checkpoints)) < 3 and time.monotonic() < deadline):
            checkpoints.step()
            time.sleep(0.001)
        assert_same(comm, (checkpoints.steps, numbers(checkpoints)))
        assert len(numbers(checkpoints)) == 3


def test_failures_of_earlier_jobs_are_counted(comm, shared_path, counter):
    for job in range(4):
        with manager(shared_path, counter, interval="auto") as checkpoints:
            checkpoints.restore()
            checkpoints.save()
            failures = checkpoints._steps._interval.failures
        if comm.rank == 0:
            # Root counts, and needs three ends of a job to say anything.
            assert failures.source.startswith("3 jobs" if job == 3 else "assumed")
            assert (failures.mtbf_seconds < 3600) == (job == 3)
