# SPDX-License-Identifier: Apache-2.0
"""A failure on any rank is one error, the same on every rank."""

import errno
import socket

import pytest

from mpi_ckpt.comm import agree, collect, meet, on_root
from mpi_ckpt.errors import (
    CheckpointError,
    CorruptGenerationError,
    LockedError,
    SaveError,
    StageError,
    WriteError,
)
from mpi_ckpt.failures import RemoteTraceback
from mpi_ckpt.leaves.digest import digest_bytes
from tests.ranks import assert_same, same_error

HOST = socket.gethostname()


def disk_is_full():
    raise OSError(errno.ENOSPC, "No space left on device", "/scratch/some-file")


def nothing():
    return "done"


@pytest.fixture
def communicator(make_communicator):
    return make_communicator(message_bytes=64)


def test_a_failure_on_each_single_rank(comm, communicator):
    for culprit in range(comm.size):
        work = disk_is_full if comm.rank == culprit else nothing
        with same_error(
            comm,
            WriteError,
            "writing a thing failed; published generations are untouched",
            f"rank {culprit} of {comm.size} on {HOST}, writing a thing: ",
            "No space left on device",
            "/scratch/some-file",
            "(OSError)",
        ) as caught:
            agree(communicator, "writing a thing", work, error=WriteError)
        error = caught.error
        assert (error.errno, error.path) == (errno.ENOSPC, "/scratch/some-file")
        (failure,) = error.failures
        assert (failure.rank, failure.size, failure.host) == (culprit, comm.size, HOST)
        assert (failure.operation, failure.kind) == ("writing a thing", "OSError")
        assert "in disk_is_full" in failure.traceback
        assert agree(communicator, "going on", nothing, error=WriteError) == "done"


def test_failures_on_all_ranks_are_all_named(comm, communicator):
    def fail():
        raise ValueError(f"this is rank {comm.rank}")

    named = [
        f"rank {r} of {comm.size} on {HOST}, staging: this is" for r in range(comm.size)
    ]
    with same_error(comm, StageError, *named) as caught:
        agree(communicator, "staging", fail, error=StageError)
    assert [failure.rank for failure in caught.error.failures] == list(range(comm.size))
    assert len(caught.error.problems) == comm.size


def test_tracebacks_travel(comm, communicator):
    culprit = comm.size - 1
    raised = []

    def fail_there():
        if comm.rank == culprit:
            raised.append(KeyError("gone"))
            raise raised[0]

    with same_error(comm, SaveError) as caught:
        agree(communicator, "looking up", fail_there, error=SaveError)
    cause = caught.error.__cause__
    if comm.rank == culprit:
        assert cause is raised[0]
    else:
        assert isinstance(cause, RemoteTraceback)
        assert f"rank {culprit} of {comm.size} on {HOST}:" in str(cause)
        assert "in fail_there" in str(cause)
        assert "KeyError: 'gone'" in str(cause)


def test_an_error_of_the_family_keeps_its_class(comm, communicator):
    culprit = comm.size - 1

    def fail():
        if comm.rank == culprit:
            raise LockedError("held by job 7", path="/scratch/.lock")

    with same_error(comm, LockedError, "held by job 7", "/scratch/.lock") as caught:
        agree(communicator, "locking", fail, error=SaveError)
    assert caught.error.path == "/scratch/.lock"


def test_the_lowest_rank_decides_the_class(comm, communicator):
    def fail():
        if comm.rank == 0:
            raise CorruptGenerationError("bit rot")
        raise LockedError("held")

    with same_error(comm, CorruptGenerationError, "bit rot") as caught:
        agree(communicator, "reading", fail, error=SaveError)
    assert len(caught.error.failures) == comm.size


def test_what_is_still_safe_is_said(comm, communicator):
    with same_error(comm, StageError, "summing failed; nothing was added"):
        agree(
            communicator,
            "summing",
            disk_is_full,
            error=StageError,
            safe="nothing was added",
        )


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_stays_one_where_it_came(comm, communicator, kind):
    culprit = comm.size - 1

    def work():
        if comm.rank == culprit:
            raise kind

    try:
        agree(communicator, "writing", work, error=SaveError)
        found = "nothing"
    except BaseException as error:
        found = type(error).__name__, str(error) if isinstance(error, Exception) else ""
    everyone = comm.allgather(found)
    assert everyone[culprit] == (kind.__name__, "")
    assert len(set(everyone[:culprit])) <= 1
    for name, message in everyone[:culprit]:
        assert name == "SaveError"
        assert (
            f"rank {culprit} of {comm.size} on {HOST}, writing: {kind.__name__}" in message
        )
    assert agree(communicator, "going on", nothing, error=SaveError) == "done"


class Awkward(Exception):
    """As exceptions of other libraries are at times."""

    errno = "E_WHATEVER"
    path = b"\xff"

    def __str__(self):
        if self.args[0] == "unprintable":
            raise RuntimeError("no text either")
        return self.args[0]


@pytest.mark.parametrize("text", ["", "unprintable", "lone \ud800", "x" * 200_000, "a\nb"])
def test_awkward_exceptions_travel_too(comm, communicator, text):
    def work():
        if comm.rank == comm.size - 1:
            raise Awkward(text)

    with same_error(comm, SaveError, "(Awkward)") as caught:
        agree(communicator, "staging", work, error=SaveError)
    assert caught.error.errno is None
    if text != "unprintable":
        told = str(caught.error)
        assert text[:4000] in told
        assert text[-4000:] in told
        assert len(told) < 10_000  # of each of many ranks so much may be told


def test_no_failure_returns_what_each_rank_made(comm, communicator):
    assert agree(communicator, "making", lambda: comm.rank, error=SaveError) == comm.rank
    assert on_root(communicator, "making", lambda: "made", error=SaveError) == "made"
    assert on_root(communicator, "making", lambda: None, error=SaveError) is None


def test_only_root_works(comm, communicator):
    called = []
    on_root(communicator, "making", lambda: called.append(1), error=SaveError)
    assert called == [1] * (comm.rank == 0)
    with same_error(comm, SaveError, f"rank 0 of {comm.size} on {HOST}, writing"):
        on_root(communicator, "writing", disk_is_full, error=SaveError)


def test_what_root_tells_may_be_longer_than_a_message(comm, communicator):
    told = {"names": [f"name {number}" for number in range(1000)]}
    mine = told if comm.rank == 0 else None
    assert on_root(communicator, "telling", lambda: mine, error=SaveError) == told


def test_results_are_compared_and_told_in_the_same_meeting(comm, communicator):
    for mine in ("the same", f"of rank {comm.rank}"):
        met = meet(
            communicator,
            "comparing",
            lambda mine=mine: mine,
            error=SaveError,
            digest=lambda result: digest_bytes(result.encode()),
            encode=lambda result: result.encode(),
        )
        assert met.result == mine
        assert met.message == comm.bcast(mine).encode()
        assert met.is_alike == (comm.size == 1 or mine == "the same")


def test_what_fails_while_it_is_told_is_agreed_on(comm, communicator):
    def encode(result):
        raise ValueError("no words for it")

    with same_error(comm, SaveError, f"rank 0 of {comm.size} on {HOST}", "no words"):
        meet(communicator, "sending", nothing, error=SaveError, encode=encode)


def test_bytes_of_all_are_combined_on_root_for_all(comm, communicator):
    def combine(parts):
        assert comm.rank == 0
        return [part.decode() for part in parts]

    mine = ("x" * 100 * comm.rank).encode()
    found = collect(communicator, "gathering", lambda: mine, combine, error=SaveError)
    assert found == ["x" * 100 * rank for rank in range(comm.size)]


@pytest.mark.parametrize("where", ["part", "combine"])
def test_bytes_that_cannot_be_made_or_combined_are_agreed_on(comm, communicator, where):
    culprit = comm.size - 1 if where == "part" else 0

    def part():
        if where == "part" and comm.rank == culprit:
            disk_is_full()
        return b"part"

    def combine(parts):
        disk_is_full()

    with same_error(comm, SaveError, f"rank {culprit} of {comm.size} on {HOST}"):
        collect(communicator, "gathering", part, combine, error=SaveError)


def test_thirty_failures_in_a_row(comm, communicator):
    for turn in range(30):
        work = disk_is_full if turn % comm.size == comm.rank else nothing
        with pytest.raises(SaveError, match=f"rank {turn % comm.size} of"):
            agree(communicator, f"turn {turn}", work, error=SaveError)
    assert_same(comm, agree(communicator, "going on", nothing, error=CheckpointError))
