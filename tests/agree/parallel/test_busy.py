# SPDX-License-Identifier: Apache-2.0
"""A rank that says that it is busy is waited for; one that has died is not."""

import logging
import re
import threading
import time
from contextlib import ExitStack, suppress

import numpy as np
import pytest

from mpi_ckpt import ArrayState
from mpi_ckpt.comm import busy, liveness, presence
from mpi_ckpt.errors import CollectiveError, OptionsError
from tests.ranks import RecordingHandle, manager

DEADLINE = 0.8
BUSY_SECONDS = 1.2


@pytest.fixture
def warned(monkeypatch):
    """What is warned of, as it comes, and soon."""
    told = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("mpi_ckpt.comm")
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


@pytest.fixture
def checkpoints(comm, shared_path):
    """A manager whose deadline is short from now on, once all ranks have their part."""
    with manager(shared_path, ArrayState("a", {"x": np.arange(5.0)})) as made:
        made.save()
        comm.barrier()
        made._session.comm.deadline_seconds = DEADLINE
        yield made
        made._session.comm.deadline_seconds = 35


def call_of(made, call):
    return {
        "save": made.save,
        "sync": made.sync,
        "restore": made.restore,
        "step": made.step,
        "generations": made.generations,
        "should_stop": made.should_stop,
    }[call]


LONG = [
    pytest.param(call, marks=pytest.mark.long)
    for call in ("save", "sync", "restore", "should_stop", "generations")
]


@pytest.mark.parametrize("call", ["step", *LONG])
def test_every_call_waits_for_a_busy_rank(peers, checkpoints, call):
    last = peers.size - 1
    call_of(checkpoints, call)()  # step() posts the vote that it reads in the next
    if peers.rank == last:
        with checkpoints.busy("writing VTK"):
            time.sleep(BUSY_SECONDS)
    call_of(checkpoints, call)()
    assert checkpoints.save().generation > 1


def test_root_and_others_at_once_and_nested(peers, checkpoints):
    with ExitStack() as stack:
        if peers.rank == 0 or peers.rank == peers.size - 1:
            stack.enter_context(checkpoints.busy("the first"))
            with suppress(ValueError), checkpoints.busy("the second"):
                time.sleep(0.2)
                raise ValueError("no luck")
            time.sleep(BUSY_SECONDS)
    checkpoints.save()


def test_all_ranks_are_busy_and_one_waits_within(peers, checkpoints):
    with checkpoints.busy("everything"):
        checkpoints.save()
        time.sleep(0.1)
    checkpoints.save()
    assert busy._OWN == []


def test_what_a_rank_is_busy_with_is_told(peers, checkpoints, warned, monkeypatch):
    monkeypatch.setattr(liveness, "WARNED_SECONDS", 0.3)
    last = peers.size - 1
    if peers.rank == last:
        with checkpoints.busy("writing\n  VTK"):
            time.sleep(BUSY_SECONDS)
    checkpoints.save()
    told = [text for text in warned if "writing VTK" in text]
    if peers.rank == 0:
        name = rf"rank {last} on \S+ has been busy for \d s: writing VTK"
        assert re.search(rf"has waited .* for other ranks, .*; {name}$", told[0]), told
        assert re.search(rf"waits beyond the deadline of 0.8 s, .*: {name}$", told[1]), told
        assert len(told) == 2
    elif peers.rank == last:
        assert told == []


def test_after_its_end_the_deadline_counts_anew(peers, checkpoints):
    last = peers.size - 1
    if peers.rank == last:
        with checkpoints.busy("the first half"):
            time.sleep(BUSY_SECONDS)
        time.sleep(0.6 * DEADLINE)
    checkpoints.save()


def test_two_managers_hear_of_it(peers, shared_path):
    states = ArrayState("a", {"x": np.arange(5.0)})
    with (
        manager(shared_path / "one", states) as checkpoints,
        manager(shared_path / "two", states) as two,
    ):
        peers.barrier()
        two._session.comm.deadline_seconds = DEADLINE
        if peers.rank == 0:
            with checkpoints.busy("training"):
                time.sleep(BUSY_SECONDS)
        two.save()
        two._session.comm.deadline_seconds = 35


def test_before_the_first_meeting_and_after_the_last(comm, shared_path):
    with manager(shared_path, ArrayState("a", {"x": np.arange(5.0)})) as checkpoints:
        with checkpoints.busy("reading"):
            pass
        checkpoints.save()
        inside = checkpoints.busy("tidying up")
        inside.__enter__()
    inside.__exit__(None, None, None)
    with checkpoints.busy("when nobody waits any more"):
        pass
    assert busy._OWN == []
    with manager(shared_path, ArrayState("a", {"x": np.arange(5.0)})) as checkpoints:
        assert checkpoints.restore().generation == 1


def test_many_managers_one_after_the_other_lose_no_message(comm, shared_path):
    for _ in range(20):
        with manager(shared_path, ArrayState("a", {"x": np.arange(5.0)})) as checkpoints:
            for _ in range(5):
                with checkpoints.busy("a moment"):
                    pass
            assert checkpoints.should_stop() is False
            with checkpoints.busy("the last moment"):
                pass


def test_messages_cost_nothing_while_nobody_is_busy(comm, checkpoints):
    checkpoints._session.comm.deadline_seconds = 35
    with RecordingHandle(checkpoints._session.comm) as recorded:
        checkpoints.save()
        quiet = recorded.sent_by("Isend")
        checkpoints.step()
        assert recorded.sent_by("Isend") == quiet
        before = len(recorded.messages)
        with checkpoints.busy("a moment"):
            pass
        assert len(recorded.messages) - before == 2 * (comm.size - 1)
        assert recorded.sent_by("Isend") - quiet == 2 * (comm.size - 1) * 280


@pytest.mark.parametrize("most", [0, -1, float("inf"), float("nan")])
def test_what_makes_no_sense_is_refused(comm, checkpoints, most):
    checkpoints._session.comm.deadline_seconds = 35
    with pytest.raises(OptionsError, match="at_most_seconds"):
        checkpoints.busy("training", at_most_seconds=most).__enter__()
    with pytest.raises(OptionsError, match="few words"):
        checkpoints.busy(" \n").__enter__()
    assert busy._OWN == []


def test_another_thread_is_refused(comm, checkpoints):
    checkpoints._session.comm.deadline_seconds = 35
    caught = []

    def enter():
        try:
            with checkpoints.busy("training"):
                pass
        except CollectiveError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "another thread" in caught[0]


def broken(made):
    """Wait for ranks that do not come; return what is said of them."""
    with pytest.raises(CollectiveError) as caught:
        made.save()
    return str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("how", ["said too little", "seen to die"])
def test_a_busy_rank_is_missed_after_all(peers, shared_path, monkeypatch, how):
    made = manager(shared_path, ArrayState("a", {"x": np.arange(5.0)}))
    made.save()
    last = peers.size - 1
    made._session.comm.deadline_seconds = 2
    peers.barrier()
    if peers.rank == last:
        most = 1 if how == "said too little" else 3600
        with made.busy("writing VTK", at_most_seconds=most):
            for rank in range(last):
                peers.recv(source=rank)
        text = broken(made)
        assert "the others gave up waiting for this rank" in text
        return
    if how == "seen to die":
        monkeypatch.setattr(presence.Presence, "is_gone", True)
    text = broken(made)
    peers.send(None, dest=last)
    assert f"rank {last} on " in text
    assert "it has been busy for " in text
    assert ("it had said at most 1 s" in text) == (how == "said too little")
    assert "`with manager.busy(" in text
