# SPDX-License-Identifier: Apache-2.0
"""Orders ranks as another library does that connects the same processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm.agreement import agree
from mpi_ckpt.comm.collectives import bcast_json, gather_bytes
from mpi_ckpt.comm.communicator import Communicator
from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI


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
