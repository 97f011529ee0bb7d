# SPDX-License-Identifier: Apache-2.0
"""What is said of ranks that do not come: to whoever waits, and when they are given up."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from mpi_ckpt.comm.liveness import has_left
from mpi_ckpt.errors import CollectiveError, Telling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm.communicator import Communicator

logger = logging.getLogger(__name__)

WARNED_SECONDS = 30.0

REASON = "what takes so long"


class LastMeeting:
    """What all ranks last met for, and when. Not collective. Not thread-safe."""

    def __init__(self) -> None:
        self._met: tuple[str, float] | None = None

    def note(self, doing: str) -> None:
        """Remember that all ranks have given their part for something."""
        self._met = (doing, time.monotonic())

    def __str__(self) -> str:
        if self._met is None:
            return ""
        doing, at = self._met
        return f"; all ranks last met {time.monotonic() - at:.0f} s ago (for: {doing})"


def warn_of_wait(comm: Communicator, doing: str) -> None:
    """Say that a rank has waited for a while; only two of them do.

    Not collective. Main thread only. Root says so, or the next where it is root that does
    not come: no others, or there would be a line for each of a thousand ranks.

    Args:
        comm: Of the rank that waits.
        doing: What the ranks meet for.
    """
    if comm.size > 1 and comm.rank <= 1:
        comm.busy_ranks.listen()
        known = comm.busy_ranks.describe()
        logger.warning(
            "%s waits for other ranks since %.0f s, in %s (%s): it is collective, so every "
            "rank must call it; %s",
            *(comm.name, WARNED_SECONDS, comm.call, doing),
            "; ".join(known)
            if known
            else f"an error names the absent after {comm.deadline_seconds:g} s "
            "(Options.deadline_seconds)",
        )


def name_absent(absent: Sequence[int], hosts: Sequence[str], deadline: float) -> str:
    """Return in words who has not come. Not collective.

    Args:
        absent: The ranks; none if all have come, and wait for different things.
        hosts: Of all ranks.
        deadline: In seconds.
    """
    if not absent:
        return (
            f"no progress within {deadline:g} s, though all {len(hosts)} ranks are "
            "waiting: they disagree about what comes next"
        )
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in absent)
    return f"{named} of {len(hosts)} did not arrive within {deadline:g} s"


def what_is_missing(comm: Communicator, absent: Sequence[int]) -> str:
    """Return in words why ranks cannot meet. Not collective. Main thread only.

    Args:
        comm: Of the rank that waited.
        absent: The ranks that have not answered.
    """
    return (not absent and _who_has_left(comm)) or name_absent(
        absent, comm.hosts, comm.deadline_seconds
    )


def why_called_off(comm: Communicator) -> str:
    """Return in words why the others wait no longer. Not collective. Main thread only.

    Args:
        comm: Of a rank that comes to a meeting which is called off.
    """
    late = f"the others gave up waiting for this rank{comm.last_met}"
    return _who_has_left(comm) or late


def _who_has_left(comm: Communicator) -> str:
    left = has_left(comm.handle)
    named = ", ".join(f"rank {rank} on {comm.hosts[rank]}" for rank in left)
    return named and f"{named} has left by an error, which its own output tells"


def missed_deadline(
    comm: Communicator, absent: Sequence[int], doing: str, advice: str
) -> CollectiveError:
    """Return the error of a rank whose deadline has passed. Not collective.

    What this rank can see of the absent is its own view: a process on another host cannot
    be seen.

    Args:
        comm: Of the rank that waited.
        absent: The ranks that have not come; none if they disagree.
        doing: What the ranks meet for.
        advice: What is still safe, and what to do.
    """
    comm.busy_ranks.listen()  # another may have been the first to give up
    what = what_is_missing(comm, absent)
    if absent:
        what += (
            f"; every rank must call {comm.call} within Options.deadline_seconds, or say "
            f"that it comes late: `with manager.busy({REASON!r}):`"
        )
    problems = []
    for rank in absent:
        seen = f": {comm.visible[rank].describe()}" if rank in comm.visible else ""
        if said := comm.busy_ranks.tell_of(rank):
            seen += f"; it {said}"
        problems.append(f"rank {rank} on {comm.hosts[rank]}{seen}{comm.last_met}")
    text = "\n  ".join([f"{doing}: {what}; {advice}", *problems])
    error = CollectiveError(text, problems=problems)
    # Each tells what it sees of the absent; one of them tells where in the program.
    is_first = comm.rank == min(set(range(comm.size)).difference(absent))
    error.telling = Telling(comm.name, "" if is_first else f"CollectiveError: {error}")
    return error
