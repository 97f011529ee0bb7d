# SPDX-License-Identifier: Apache-2.0
"""Orders ranks as another library does that connects the same processes.

Horovod uses a private duplicate. Its ranks are found from its own rank and size: if it has
all ranks of a known communicator, MPI alone gives the order; if it has some of them,
Horovod's own allgather shows which.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm.admission import check_before
from mpi_ckpt.comm.agreement import agree
from mpi_ckpt.comm.collectives import bcast_json
from mpi_ckpt.comm.communicator import Communicator
from mpi_ckpt.comm.launch import check_horovod, find_horovod, load_mpi, mark_horovods
from mpi_ckpt.comm.liveness import Tag
from mpi_ckpt.comm.rank_tree import gather_bytes
from mpi_ckpt.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

_NAME = "mpi_ckpt.communicator"


@dataclass(frozen=True, slots=True)
class Claim:
    """Another library's numbers for this process.

    Attributes:
        group: Number of its group of ranks; None for none.
        rank: Rank in that group.
        size: Number of ranks of that group.
    """

    group: int | None
    rank: int
    size: int


def order_ranks(
    comm: MPI.Intracomm | None,
    ask: Callable[[], Claim],
    *,
    library: str,
    advice: str,
    deadline_seconds: float,
) -> MPI.Intracomm | None:
    """Make a communicator of each group, with the other library's ranks.

    Collective over ``comm``. Main thread only.

    Args:
        comm: Communicator of all these processes; None is the world.
        ask: Returns the library's claim on this process. Must not communicate.
        library: Name of the library, for messages.
        advice: What to do if the two do not fit.
        deadline_seconds: How long to wait for absent ranks.

    Returns:
        The communicator of this rank's group, which the caller must free; None for a rank
        in no group.

    Raises:
        LaunchError: On every rank, if the ranks of the two do not fit.
        CollectiveError: On every live rank, if one never arrives.
    """
    mpi: Any = load_mpi()
    parent = mpi.COMM_WORLD if comm is None else comm
    ours = Communicator(comm, deadline_seconds=deadline_seconds)
    doing = f"comparing the ranks of MPI and of {library}"
    claim = agree(ours, doing, ask, error=LaunchError)
    group = -1 if claim.group is None else claim.group
    mine = b"%d %d %d" % (group, claim.rank, claim.size)
    texts = gather_bytes(ours, mine, doing)
    claims = [_parse(text) for text in texts]
    problems: list[str] = bcast_json(ours, find_contradictions(claims), doing)
    ours.close()
    if problems:
        raise LaunchError(
            f"MPI and {library} disagree about the ranks of the job; {advice}:\n  "
            + "\n  ".join(problems),
            problems=problems,
        )
    # MPI: a split has no deadline, and needs none: all ranks have just met.
    color = mpi.UNDEFINED if claim.group is None else claim.group
    ordered: Any = parent.Split(color, claim.rank)
    return None if ordered == mpi.COMM_NULL else ordered


def find_contradictions(claims: Sequence[Claim]) -> list[str]:
    """Return the contradictions between the claims of a job's processes. Pure.

    Args:
        claims: The claim of each rank of MPI, in order.
    """
    problems = []
    groups: dict[int, list[tuple[int, Claim]]] = {}
    for rank, claim in enumerate(claims):
        if claim.group is not None:
            groups.setdefault(claim.group, []).append((rank, claim))
    for members in groups.values():
        ranks, size = [rank for rank, _ in members], len(members)
        problems += [
            f"rank {rank} of MPI is rank {claim.rank} of {claim.size} there, and MPI sees "
            f"{size} such process{'es'[: 2 * (size != 1)]}: {ranks}"
            for rank, claim in members
            if claim.size != size
        ]
        first: dict[int, int] = {}
        for rank, claim in members:
            if first.setdefault(claim.rank, rank) != rank:
                problems.append(
                    f"ranks {first[claim.rank]} and {rank} of MPI are both rank "
                    f"{claim.rank} there"
                )
    return problems


def _parse(text: bytes) -> Claim:
    group, rank, size = map(int, text.split())
    return Claim(None if group < 0 else group, rank, size)


def find_communicator(
    comm: MPI.Intracomm | None = None,
    process_set: Any = None,  # noqa: ANN401 (hvd.ProcessSet)
    *,
    deadline_seconds: float = 600.0,
) -> tuple[MPI.Intracomm, bool]:
    """Return a communicator with Horovod's ranks in its order.

    Collective over these ranks. Main thread only.

    Args:
        comm: A communicator known to have these ranks, in any order; None to find them.
        process_set: The ``hvd.ProcessSet`` with the ranks; None for all ranks.
        deadline_seconds: How long the other ranks may take; Horovod's allgather has its own
            deadline.

    Returns:
        The communicator, and whether it was made here.

    Raises:
        LaunchError: On each of these ranks, if Horovod and MPI do not work together, or do
            not have the same ranks.
        CollectiveError: On every live rank, if one never arrives.
    """
    mpi = load_mpi()
    check_before(mpi, comm)
    horovod = find_horovod()
    is_part = process_set is not None and process_set.process_set_id != 0
    if is_part and comm is not None:
        raise LaunchError("give the communicator or the process set, not both")
    if horovod is None:
        if is_part:
            raise LaunchError("a process set was given, and Horovod is not initialised")
        return mpi.COMM_WORLD if comm is None else comm, False
    if is_part or (comm is None and horovod.size() != mpi.COMM_WORLD.size):
        return _ask_horovod(mpi, horovod, process_set if is_part else None), True
    ordered = order_ranks(
        comm,
        lambda: Claim(0, horovod.rank(), horovod.size()),
        library="Horovod",
        advice="give comm=, the communicator that hvd.init(comm=...) was given",
        deadline_seconds=deadline_seconds,
    )
    assert ordered is not None
    given = mpi.COMM_WORLD if comm is None else comm
    if mpi.Comm.Compare(ordered, given) == mpi.CONGRUENT:
        ordered.Free()
        return given, False
    return ordered, True


def _ask_horovod(mpi: Any, horovod: Any, process_set: Any) -> MPI.Intracomm:  # noqa: ANN401
    # Every rank sees the faults refused here the same way: there is no communicator yet.
    check_horovod(mpi, horovod.size())
    members = _members(mpi, horovod, process_set)
    world = mpi.COMM_WORLD.Get_group()
    group = world.Incl(members)
    # Only the members call this, so it cannot be a split of the world.
    made: MPI.Intracomm = mpi.COMM_WORLD.Create_group(group, Tag.GROUP)
    group.Free()
    world.Free()
    mark_horovods(mpi, made)
    return made


def _members(mpi: Any, horovod: Any, process_set: Any) -> Sequence[int]:  # noqa: ANN401
    """Return the world's numbers of Horovod's ranks."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(horovod, "allgather"):
        raise LaunchError(
            "Horovod was not initialised with all ranks of the job; give comm=, the "
            "communicator that hvd.init(comm=...) was given"
        )
    if process_set is not None and not process_set.included():
        raise LaunchError(f"this rank is not in the process set {process_set.ranks}")
    mine = torch.tensor([mpi.COMM_WORLD.rank], dtype=torch.int64)
    options = {} if process_set is None else {"process_set": process_set}
    members: list[int] = horovod.allgather(mine, name=_NAME, **options).tolist()
    return members
