# SPDX-License-Identifier: Apache-2.0
"""Before the ranks have a communicator of this package: a wait with a deadline too.

Nobody can call the roll yet, so nobody is named; but nobody waits for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.comm.abandoned import keep
from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.survival import why_lost_ranks_end_the_job
from mpi_ckpt.comm.waiting import is_done_within
from mpi_ckpt.errors import CollectiveError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["duplicate", "meet"]


def duplicate(parent: MPI.Intracomm, deadline_seconds: float) -> MPI.Intracomm:
    """Duplicate a communicator.

    Collective. Main thread only. Without a deadline where MPI survives lost ranks, and
    can be told to look for those that stand still.

    Args:
        parent: The communicator.
        deadline_seconds: How long the others may take.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    if not why_lost_ranks_end_the_job():
        # MPI: where lost ranks are survived, this names them, and Idup something else.
        return parent.Dup()
    made, request = parent.Idup()
    meet(parent, request, deadline_seconds, buffers=made)
    return made


def meet(
    parent: MPI.Intracomm,
    request: MPI.Request,
    deadline_seconds: float,
    *,
    buffers: object = None,
) -> None:
    """Wait for something of all ranks of a communicator.

    Collective. Main thread only.

    Args:
        parent: The communicator.
        request: Posted on it.
        deadline_seconds: How long the others may take.
        buffers: What the request works on and does not hold itself.

    Raises:
        CollectiveError: On every live rank, if one never arrives, or MPI fails.
    """
    cause: BaseException | None = None
    problem = (
        f"not all of the {parent.size} ranks arrived within {deadline_seconds:g} s; "
        f"this is rank {parent.rank}"
    )
    try:
        if is_done_within(request, deadline_seconds):
            return
    except load_mpi().Exception as error:
        cause, problem = error, f"MPI failed: {error}"
    keep([request, buffers])
    raise CollectiveError(
        f"meeting for the first time: {problem}; end this job and start it again"
    ) from cause
