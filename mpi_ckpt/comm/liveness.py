# SPDX-License-Identifier: Apache-2.0
"""Makes ranks wait for one another, find absent ranks, and say farewell.

A rank whose deadline passes calls the roll: it sends out the message that it gives up, and
notes which ranks answer (`gossip`). A waiting rank answers by giving up as well, so all
live ranks raise soon after the first, and all name the silent ranks.

A rank that leaves the job alone, by an error of the program, says farewell. Otherwise it
would wait in MPI_Finalize for the others, and they would wait for it, for ever.
"""

from __future__ import annotations

import logging
import os
import time
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpi_ckpt.comm.gossip import (
    NO_WORDS,
    RollCall,
    is_passed_on,
    spread,
)
from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.survival import has_lost_ranks, live_ranks_before
from mpi_ckpt.errors import CollectiveError, Printing
from mpi_ckpt.failures import name_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

    from mpi_ckpt.comm.communicator import Communicator

logger = logging.getLogger(__name__)


# A rank that waits yields its core this often before it starts to sleep, so a short wait
# adds no latency, and a long one (while root writes) uses no core.
_YIELDS = 2000
_PAUSE_SECONDS_MAX = 1e-3
# The clock is read once in this many rounds: reading it costs more than a round.
ROUNDS_A_LOOK = 64
_ROLL_CALL_SECONDS = 3.0
# MPI: at an abort, MPICH's launcher drops output of a rank that it has not passed on yet.
_LAST_WORDS_SECONDS = 0.5
# The first rank that aborts the job ends the next one before its turn: 0.3 s was enough.
_TURN_SECONDS = 0.5
_TURNS_MAX = 20


class Tag(IntEnum):
    """The tags of all messages between two ranks."""

    ROLL_CALL = 7001
    DATA = 7002
    FAREWELL = 7003
    GREETING = 7004
    GROUP = 7005
    BUSY = 7006
    FAILED = 7007
    DONE = 7008
    ROSTER = 7009
    DISMISSAL = 7010
    TREE = 7011


class Patience:
    """Paces a loop that waits: yields the core at first, then sleeps. Main thread only.

    Not collective.

    Args:
        seconds: How long to wait; None for no limit.
        streaming: Whether data is flowing, so that the core is better spent on progress
            than on sleep.

    Attributes:
        rounds: How often the loop has gone round.
        is_over: Whether the time had passed when the clock was last read.
    """

    def __init__(self, seconds: float | None, *, streaming: bool = False) -> None:
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._streaming = streaming
        self._pause = 0.0
        self.rounds = 0
        self.is_over = False

    def renew(self) -> None:
        """Restart the time now."""
        self._deadline = None if self._seconds is None else time.monotonic() + self._seconds
        self.is_over = False

    def go_round(self) -> bool:
        """Let other threads run for a moment; return whether the clock was read.

        It is read once in 64 rounds; the caller may do its own slow checks then.
        """
        self.rounds += 1
        if self._streaming or self.rounds < _YIELDS:
            os.sched_yield()
        else:
            self._pause = min(self._pause + 1e-5, _PAUSE_SECONDS_MAX)
            time.sleep(self._pause)
        is_look = self.rounds % ROUNDS_A_LOOK == 0
        if is_look and self._deadline is not None:
            self.is_over = time.monotonic() > self._deadline
        return is_look


def is_done_within(request: MPI.Request, seconds: float | None) -> bool:
    """Wait for a request, but let signals arrive and other threads run.

    Not collective by itself. Main thread only. For requests outside of a `Communicator`,
    whose waits can call the roll.

    Args:
        request: The request.
        seconds: How long; None for no limit.

    Returns:
        Whether it is done. If not, MPI may still write to its buffers.

    Raises:
        MPI.Exception: On the calling rank, if the request failed.
    """
    patience = Patience(seconds)
    while not request.Test():
        patience.go_round()
        if patience.is_over:
            return False
    return True


# MPI: a posted operation runs even if the program gave it up or dropped its owner. Until
# then nothing else may use its buffers: these lists keep them alive.
_KEPT_FOREVER: list[object] = []
UNDER_WAY: set[object] = set()
"""Owners of requests and buffers, until they have waited for them."""


def keep_forever(*posted: object) -> None:
    """Hold requests and buffers for as long as the process lives. Not collective."""
    _KEPT_FOREVER.extend(posted)


def is_called(handle: MPI.Intracomm) -> bool:
    """Return whether another rank has called the roll. Not collective. Main thread only."""
    # MPI: a probe processes arrived messages, and may find them only the next time.
    anybody = load_mpi().ANY_SOURCE
    return any(handle.Iprobe(source=anybody, tag=Tag.ROLL_CALL) for _ in range(2))


def call_roll(handle: MPI.Intracomm) -> RollCall:
    """Send the others the message that this rank gives up; return which ranks answer.

    Not collective. Main thread only. Takes some seconds if a rank is silent.
    """
    left = has_left(handle)
    call = RollCall(handle.rank, handle.size, leaver=left[0] if left else None)
    channel = _Channel(handle, Tag.ROLL_CALL, call)
    channel.hear(lambda: call.is_complete, _ROLL_CALL_SECONDS)
    channel.send(call.to_inform(), call.encode())
    channel.let_go()
    return call


def call_off(handle: MPI.Intracomm) -> None:
    """Make all ranks of a communicator stop waiting. Not collective. Main thread only."""
    # MPI: a message to a rank that never looks stays unreceived.
    call = RollCall(handle.rank, handle.size)
    channel = _Channel(handle, Tag.ROLL_CALL, call)
    channel.let_go()


def has_left(handle: MPI.Intracomm) -> list[int]:
    """Return the first rank that has said farewell, if any is known. Not collective.

    Main thread only. The farewell is not received, only probed.
    """
    mpi: Any = load_mpi()
    status = mpi.Status()
    found = any(handle.Iprobe(mpi.ANY_SOURCE, Tag.FAREWELL, status) for _ in range(2))
    return [status.source] if found else []


class Farewell:
    """Sends the others the message that this rank leaves, and receives theirs.

    Not collective: under a tag that no other wait on the communicator uses. Main thread
    only.

    Args:
        comm: The communicator; it may have missed a deadline.
        words: 16 bytes for the reason; ranks that leave for the same reason send the same.
    """

    def __init__(self, comm: Communicator, words: bytes = NO_WORDS) -> None:
        self._call = RollCall(comm.rank, comm.handle.size, words)
        self._channel = _Channel(comm.handle, Tag.FAREWELL, self._call)
        # MPI: some ranks never receive it, but so few bytes are sent at once even so.
        self._channel.let_go()

    def missing(self, seconds: float) -> list[int]:
        """Wait for the farewells of all others; return the ranks that send none.

        Not collective. Main thread only.

        Args:
            seconds: How long to wait.
        """
        self._channel.hear(lambda: self._call.is_complete, seconds)
        self._channel.let_go()
        return self._call.absent

    def words_of_root(self, seconds: float) -> bytes:
        """Wait for the farewell of root; return its words, empty if it is late.

        Not collective. Main thread only.

        Args:
            seconds: How long to wait.
        """
        self._channel.hear(lambda: self._call.is_present(0), seconds)
        self._channel.let_go()
        return self._call.words_of_root if self._call.is_present(0) else b""


def abort_job(code: int) -> None:
    """End all ranks of the job at once. Not collective. Does not return."""
    time.sleep(_LAST_WORDS_SECONDS)
    mpi = load_mpi()
    if has_lost_ranks(mpi.COMM_WORLD):
        # MPI: if several ranks call it at once after one was lost, Open MPI's mpirun hangs,
        # or returns 0.
        time.sleep(_TURN_SECONDS * min(live_ranks_before(mpi.COMM_WORLD), _TURNS_MAX))
    mpi.COMM_WORLD.Abort(code)


def is_mpi_running() -> bool:
    """Return whether MPI is not finalized yet. Not collective. Starts MPI."""
    return not load_mpi().Is_finalized()


class _Channel:
    """Carries a roll call between ranks, under a tag. Begins by sending it.

    Args:
        handle: The communicator.
        tag: The tag of its messages.
        call: What this rank knows.
    """

    def __init__(self, handle: MPI.Intracomm, tag: Tag, call: RollCall) -> None:
        self._mpi: Any = load_mpi()
        self._handle, self._tag, self._call = handle, tag, call
        self._status = self._mpi.Status()
        self._sends: list[MPI.Request] = []
        self.send(call.neighbours, call.encode())

    def send(self, ranks: Sequence[int], words: bytes) -> None:
        self._sends += [self._handle.Isend(words, rank, self._tag) for rank in ranks]

    def hear(self, is_enough: Callable[[], bool], seconds: float) -> None:
        """Receive and pass on, until there is enough or nothing is heard for a time."""
        patience = Patience(seconds)

        def pause(has_news: bool) -> bool:
            # News that is passed on takes several steps: each of them has its time.
            if has_news and is_passed_on(self._call.size):
                patience.renew()
            patience.go_round()
            return patience.is_over

        spread(self._call, self.send, self._receive, is_enough, pause)

    def let_go(self) -> None:
        """Leave to MPI the messages to ranks that may never receive them."""
        keep_forever([send for send in self._sends if not send.Test()])
        self._sends = []

    def _receive(self) -> bytes | None:
        if not self._handle.Iprobe(self._mpi.ANY_SOURCE, self._tag, self._status):
            return None
        words = np.empty(self._call.nbytes, np.uint8)
        self._handle.Recv(words, self._status.source, self._tag)
        return words.tobytes()


WARNED_SECONDS = 30.0
# An error names and describes so many ranks; of more it gives ranges.
_NAMED_MAX = 8
_DESCRIBED_MAX = 16

REASON = "what takes so long"


class LastMeeting(NamedTuple):
    """The last meeting of all ranks.

    Attributes:
        doing: What they met for; empty if they have not met yet.
        at: When, by `time.monotonic`.
    """

    doing: str = ""
    at: float = 0.0

    def __str__(self) -> str:
        if not self.doing:
            return ""
        ago = time.monotonic() - self.at
        return f"; all ranks last met {ago:.0f} s ago (for: {self.doing})"


def warn_of_wait(comm: Communicator, doing: str) -> None:
    """Log that a rank has waited for a while; at most two ranks do so.

    Not collective. Main thread only. Root logs it, or rank 1 if root may be the absent one.
    No other rank does, or a thousand ranks would log a thousand lines.

    Args:
        comm: Communicator of the waiting rank.
        doing: What the ranks meet for.
    """
    if comm.size > 1 and comm.rank <= 1:
        comm.busy_ranks.listen()
        known = comm.busy_ranks.describe()
        logger.warning(
            "%s has waited %.0f s for other ranks, in %s (%s): it is collective, so every "
            "rank must call it, never one alone (`if rank == 0:`); %s",
            *(comm.name, WARNED_SECONDS, comm.call, doing),
            "; ".join(known)
            if known
            else f"after {comm.deadline_seconds:g} s (Options.deadline_seconds) an error "
            "names the absent ranks",
        )


def name_absent(absent: Sequence[int], hosts: Sequence[str], deadline: float) -> str:
    """Return in words which ranks are absent. Not collective.

    Args:
        absent: The ranks; none if all have arrived, but at different meetings.
        hosts: Host names of all ranks.
        deadline: The deadline in seconds.
    """
    if not absent:
        return (
            f"no progress within {deadline:g} s, though all {len(hosts)} ranks are "
            "waiting: they disagree about what comes next"
        )
    if len(absent) > _NAMED_MAX:
        return f"{name_ranks(absent, hosts)} did not arrive within {deadline:g} s"
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in absent)
    return f"{named} of {len(hosts)} did not arrive within {deadline:g} s"


def what_is_missing(comm: Communicator, call: RollCall) -> str:
    """Return in words why ranks cannot meet. Not collective. Main thread only.

    Args:
        comm: Communicator of the waiting rank.
        call: The ranks that have answered.
    """
    return (call.is_complete and _who_has_left(comm, call)) or name_absent(
        call.absent, comm.hosts, comm.deadline_seconds
    )


def why_called_off(comm: Communicator) -> str:
    """Return in words why the other ranks wait no longer. Not collective. Main thread only.

    Args:
        comm: Communicator of a rank that arrives at a cancelled meeting.
    """
    late = f"the others gave up waiting for this rank{comm.last_met}"
    return _who_has_left(comm) or late


def _who_has_left(comm: Communicator, call: RollCall | None = None) -> str:
    left = has_left(comm.handle)
    if call is not None and call.leaver is not None:
        left = [call.leaver]
    named = ", ".join(f"rank {rank} on {comm.hosts[rank]}" for rank in left)
    return named and f"{named} has failed; its own output has the error"


def missed_deadline(
    comm: Communicator, call: RollCall, doing: str, advice: str
) -> CollectiveError:
    """Return the error of a rank whose deadline has passed. Not collective.

    The error describes the absent ranks as this rank sees them: it cannot see a process on
    another host.

    Args:
        comm: Of the rank that waited.
        call: The ranks that have answered; all if the ranks disagree.
        doing: What the ranks meet for.
        advice: What is still safe, and how to go on.
    """
    comm.busy_ranks.listen()  # another rank may have given up first
    what, absent = what_is_missing(comm, call), call.absent
    if absent:
        what += (
            f"; every rank must call {comm.call}, never one alone (`if rank == 0:`), "
            "within Options.deadline_seconds, or say that it comes late: "
            f"`with manager.busy({REASON!r}):`"
        )
    problems = []
    for rank in absent[:_DESCRIBED_MAX]:
        seen = f": {comm.visible[rank].describe()}" if rank in comm.visible else ""
        if said := comm.busy_ranks.words_of(rank):
            seen += f"; it {said}"
        problems.append(f"rank {rank} on {comm.hosts[rank]}{seen}{comm.last_met}")
    if more := len(absent) - len(problems):
        problems.append(f"and {more:,} more ranks")
    text = "\n  ".join([f"{doing}: {what}; {advice}", *problems])
    error = CollectiveError(text, problems=problems)
    # Each rank reports its view of the absent ones; one rank reports the place in the
    # program.
    is_first = comm.rank == call.first
    error.printing = Printing(comm.name, "" if is_first else f"CollectiveError: {error}")
    return error
