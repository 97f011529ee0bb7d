# SPDX-License-Identifier: Apache-2.0
"""Checks whether a job may begin, and lets its ranks meet for the first time.

Before the ranks have a communicator, they can refuse only faults that every rank sees the
same way. Once they can communicate, all ranks refuse a fault that any of them sees. Until
then no rank can call the roll, so errors name no absent rank; but no rank waits for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm.launch import (
    check_finalized,
    check_horovod,
    check_launch,
    is_horovods,
    load_mpi,
)
from mpi_ckpt.comm.liveness import Tag, is_done_within, keep_forever
from mpi_ckpt.comm.presence import Presence, host_name
from mpi_ckpt.comm.roster import Roster, children_of, parent_of
from mpi_ckpt.comm.survival import why_lost_ranks_end_the_job
from mpi_ckpt.errors import CollectiveError, LaunchError
from mpi_ckpt.failures import rank_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

    from mpi_ckpt.comm.roster import RankTexts
    from mpi_ckpt.comm.topology import Topology


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


def objection_of(mpi: Any, parent: MPI.Intracomm) -> str:  # noqa: ANN401 (a module)
    """Return the reason of this rank to refuse the job; empty for none.

    Not collective.

    Args:
        mpi: ``mpi4py.MPI``.
        parent: The communicator to duplicate.
    """
    try:
        check_horovod(mpi, parent.size, is_part=is_horovods(parent))
    except LaunchError as error:
        return str(error)
    return ""


def refuse_if_any_objects(objections: RankTexts) -> None:
    """Raise on every rank if any rank has an objection.

    Not collective, but the same on every rank.

    Args:
        objections: Of each rank; the same on every rank.

    Raises:
        LaunchError: On every rank, with the objecting ranks.
    """
    index_of = objections.index_of
    reasons = {
        text: np.flatnonzero(index_of == index).tolist()
        for index, text in enumerate(objections.texts)
        if text
    }
    if reasons:
        lines = [
            text if len(ranks) == len(index_of) else f"rank {rank_ranges(ranks)}: {text}"
            for text, ranks in reasons.items()
        ]
        raise LaunchError("\n  ".join(lines), problems=lines)


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


def exchange_rosters(
    handle: MPI.Intracomm, objection: str, deadline_seconds: float
) -> Roster:
    """Return what each rank says of itself: its host, and its objection to the job.

    Collective. Main thread only. A rank receives log2 N rosters and sends one; then root
    broadcasts the whole. What a rank receives grows with the number of hosts.

    Args:
        handle: The new communicator.
        objection: This rank's objection; empty for none.
        deadline_seconds: How long the other ranks may take.

    Raises:
        CollectiveError: On every live rank, if one never arrives, or MPI fails.
    """
    rank = handle.rank
    children = children_of(rank, handle.size)
    lengths = np.zeros(len(children) + 1, np.int64)
    announced = [
        handle.Irecv(lengths[at : at + 1], child, Tag.ROSTER)
        for at, child in enumerate(children)
    ]
    rosters = [Roster.own(host_name(), objection)]
    for at, child in enumerate(children):
        meet_first(handle, announced[at], deadline_seconds, buffers=lengths)
        encoded = np.empty(lengths[at], np.uint8)
        meet_first(handle, handle.Irecv(encoded, child, Tag.ROSTER), deadline_seconds)
        rosters.append(Roster.decode(encoded.tobytes()))
    mine = np.frombuffer(Roster.join(rosters).encode(), np.uint8)
    lengths[-1] = len(mine)
    parent = parent_of(rank)
    if parent is not None:
        for words in (lengths[-1:], mine):
            sent = handle.Isend(words, parent, Tag.ROSTER)
            meet_first(handle, sent, deadline_seconds)
    meet_first(handle, handle.Ibcast(lengths[-1:]), deadline_seconds, buffers=lengths)
    whole = mine if parent is None else np.empty(lengths[-1], np.uint8)
    meet_first(handle, handle.Ibcast(whole), deadline_seconds)
    return Roster.decode(whole.tobytes())


def divide_by_host(
    handle: MPI.Intracomm, topology: Topology
) -> tuple[MPI.Intracomm | None, list[int]]:
    """Make a communicator of the ranks on this host, in order.

    Collective over these ranks. Main thread only.

    Args:
        handle: Communicator of all ranks, which have just met.
        topology: The ranks by host.

    Returns:
        The communicator, None if all ranks are on one host or each on its own; and the
        ranks of this host.
    """
    ranks = topology.ranks_of(int(topology.node_of[handle.rank]))
    if len(topology.names) in (1, handle.size):
        return None, ranks
    # A split would bring together all ranks: each would hear from every other.
    everybody = handle.Get_group()
    ours = everybody.Incl(ranks)
    # MPI: this has no deadline and needs none, since all ranks have just met.
    made = handle.Create_group(ours, Tag.GROUP)
    ours.Free()
    everybody.Free()
    return made, ranks


def exchange_presences(
    node: MPI.Intracomm, ranks: Sequence[int], deadline_seconds: float
) -> dict[int, Presence]:
    """Return the processes that this one can see, by rank.

    Collective over the ranks of a host. Main thread only.

    Args:
        node: Communicator of these ranks.
        ranks: Their ranks in the job.
        deadline_seconds: How long the other ranks may take.

    Raises:
        CollectiveError: On every live rank, if one never arrives, or MPI fails.
    """
    everyone = np.zeros((node.size, Presence.nbytes), np.uint8)
    request = node.Iallgather(Presence.own().encode(), everyone)
    meet_first(node, request, deadline_seconds)
    presences = (Presence.decode(row.tobytes()) for row in everyone)
    seen = zip(ranks, presences, strict=True)
    return {rank: presence for rank, presence in seen if presence.is_visible}


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
        f"meeting for the first time: {problem}; every rank must make the manager, never "
        "one alone (`if rank == 0:`); end this job and start it again"
    ) from cause
