# SPDX-License-Identifier: Apache-2.0
"""Checks whether a job may begin, and lets its ranks meet for the first time.

Before the ranks have a communicator, they can refuse only faults that every rank sees the
same way. Once they can communicate, all ranks refuse a fault that any of them sees. Until
then no rank can call the roll, so errors name no absent rank; but no rank waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm.horovod_checks import check_finalized, check_horovod, is_horovods
from mpi_ckpt.comm.launch import check_launch, load_mpi
from mpi_ckpt.comm.liveness import is_done_within, keep_forever
from mpi_ckpt.comm.presence import Presence
from mpi_ckpt.comm.survival import why_lost_ranks_end_the_job
from mpi_ckpt.errors import CollectiveError, LaunchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI


def check_before(mpi: Any, comm: MPI.Intracomm | None) -> None:  # noqa: ANN401 (a module)
    """Refuse faults that every rank sees the same way.

    Not collective.

    Args:
        mpi: ``mpi4py.MPI``.
        comm: The user's communicator; None is the world.

    Raises:
        LaunchError: On every rank.
    """
    check_finalized(mpi)
    if comm is not None and comm == mpi.COMM_NULL:
        raise LaunchError("the communicator is COMM_NULL: it was freed, or never made")
    if comm is not None and not isinstance(comm, mpi.Comm):
        raise LaunchError(
            f"comm is {comm!r}, not a communicator of mpi4py: give one, such as "
            "MPI.COMM_WORLD, or None for all ranks of the job"
        )
    if comm is not None and comm.Is_inter():
        raise LaunchError(
            "an intercommunicator joins two groups of ranks, but a manager has one group: "
            "give it comm.Merge(), or give each group a communicator of its own"
        )
    # A program that passes COMM_SELF means a job of one rank.
    if comm is None or comm != mpi.COMM_SELF:
        name, version = mpi.get_vendor()
        # A spawned rank has a world of its own, and its peers are in `comm`.
        size = max(mpi.COMM_WORLD.size, 1 if comm is None else comm.size)
        check_launch(size, f"{name} {'.'.join(map(str, version))}")


@dataclass(frozen=True, slots=True)
class Objection:
    """The reason of this rank to refuse the job.

    Attributes:
        text: The reason; empty for none.
    """

    text: str = ""

    @classmethod
    def of(cls, mpi: Any, parent: MPI.Intracomm) -> Objection:  # noqa: ANN401 (a module)
        """Look for a reason. Not collective.

        Args:
            mpi: ``mpi4py.MPI``.
            parent: The communicator to duplicate.
        """
        try:
            check_horovod(mpi, parent.size, is_part=is_horovods(parent))
        except LaunchError as error:
            return cls(str(error))
        return cls()

    @property
    def is_raised(self) -> bool:
        """Whether there is a reason."""
        return self.text != ""

    def settle(self, handle: MPI.Intracomm, raised: Sequence[bool]) -> None:
        """Raise on every rank if any rank has an objection.

        Collective. Main thread only.

        Args:
            handle: Communicator on which all ranks have just met.
            raised: Which ranks have an objection, the same on every rank.

        Raises:
            LaunchError: On every rank, with the names of the objecting ranks.
        """
        if not any(raised):
            return
        reasons: dict[str, list[int]] = {}
        for rank, text in enumerate(handle.allgather(self.text)):
            if text:
                reasons.setdefault(text, []).append(rank)
        lines = [
            text if len(ranks) == len(raised) else f"rank {_join(ranks)}: {text}"
            for text, ranks in reasons.items()
        ]
        raise LaunchError("\n  ".join(lines), problems=lines)


def _join(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def duplicate_within(parent: MPI.Intracomm, deadline_seconds: float) -> MPI.Intracomm:
    """Duplicate a communicator.

    Collective. Main thread only. Without a deadline if MPI survives lost ranks, and can be
    set to detect hung ones.

    Args:
        parent: The communicator.
        deadline_seconds: How long the other ranks may take.

    Raises:
        CollectiveError: On every live rank, if one never arrives.
    """
    if not why_lost_ranks_end_the_job():
        # MPI: if MPI survives lost ranks, Dup names them, and Idup something else.
        return parent.Dup()
    made, request = parent.Idup()
    meet_first(parent, request, deadline_seconds, buffers=made)
    return made


def exchange_presences(
    handle: MPI.Intracomm, objection: Objection, deadline_seconds: float
) -> tuple[Presence, ...]:
    """Return where each rank runs, and whether it objects to the job.

    Collective. Main thread only.

    Args:
        handle: The new communicator.
        objection: This rank's objection.
        deadline_seconds: How long the other ranks may take.

    Raises:
        CollectiveError: On every live rank, if one never arrives, or MPI fails.
    """
    mine = Presence.own(objects=objection.is_raised).encode()
    everyone = np.zeros((handle.size, Presence.nbytes), np.uint8)
    request = handle.Iallgather(mine, everyone)
    meet_first(handle, request, deadline_seconds)
    return tuple(Presence.decode(row.tobytes()) for row in everyone)


def meet_first(
    parent: MPI.Intracomm,
    request: MPI.Request,
    deadline_seconds: float,
    *,
    buffers: object = None,
) -> None:
    """Wait for a request that needs all ranks of a communicator.

    Collective. Main thread only.

    Args:
        parent: The communicator.
        request: A request posted on it.
        deadline_seconds: How long the other ranks may take.
        buffers: Buffers that the request uses but does not keep alive.

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
    keep_forever(request, buffers)
    raise CollectiveError(
        f"meeting for the first time: {problem}; end this job and start it again"
    ) from cause
