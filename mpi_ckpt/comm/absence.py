# SPDX-License-Identifier: Apache-2.0
"""What is said of ranks that do not come: to whoever waits, and when they are given up."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.comm.communicator import Communicator
    from mpi_ckpt.comm.presence import Presence

__all__ = ["WARNED_SECONDS", "LastMeeting", "name_absent", "warn_of_wait", "whereabouts"]

logger = logging.getLogger(__name__)

WARNED_SECONDS = 30.0


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

    Not collective. Root says so, or the next where it is root that does not come: no
    others, or there would be a line for each of a thousand ranks.

    Args:
        comm: Of the rank that waits.
        doing: What the ranks meet for.
    """
    if comm.size > 1 and comm.rank <= 1:
        logger.warning(
            "%s waits for other ranks since %.0f s, in %s (%s): it is collective, so every "
            "rank must call it; an error names the absent after %g s "
            "(Options.deadline_seconds)",
            *(comm.name, WARNED_SECONDS, comm.call, doing, comm.deadline_seconds),
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


def whereabouts(
    rank: int, hosts: Sequence[str], visible: Mapping[int, Presence], met: LastMeeting
) -> str:
    """Return what this rank can see of another. Not collective.

    Each rank's own view: a process on another host cannot be seen.

    Args:
        rank: The other.
        hosts: Of all ranks.
        visible: The processes that could be seen from here at the start.
        met: What all ranks last met for.
    """
    seen = f": {visible[rank].describe()}" if rank in visible else ""
    return f"rank {rank} on {hosts[rank]}{seen}{met}"
