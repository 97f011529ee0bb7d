# SPDX-License-Identifier: Apache-2.0
"""Words the warnings and errors about ranks that do not arrive at a meeting."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from mpi_ckpt.comm.liveness import has_left
from mpi_ckpt.errors import CollectiveError, Printing
from mpi_ckpt.failures import name_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm.communicator import Communicator
    from mpi_ckpt.comm.gossip import RollCall

logger = logging.getLogger(__name__)

WARNED_SECONDS = 30.0
# An error names and describes so many ranks; of more it gives ranges.
_NAMED_MAX = 8
_DESCRIBED_MAX = 16

REASON = "what takes so long"


class LastMeeting:
    """The last meeting of all ranks, and its time. Not collective. Not thread-safe."""

    def __init__(self) -> None:
        self._met: tuple[str, float] | None = None

    def note(self, doing: str) -> None:
        """Note that all ranks have taken part in a meeting."""
        self._met = (doing, time.monotonic())

    def __str__(self) -> str:
        if self._met is None:
            return ""
        doing, at = self._met
        return f"; all ranks last met {time.monotonic() - at:.0f} s ago (for: {doing})"


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
