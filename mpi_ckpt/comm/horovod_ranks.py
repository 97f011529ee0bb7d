# SPDX-License-Identifier: Apache-2.0
"""Makes a communicator of Horovod's ranks, in Horovod's order.

Horovod uses a private duplicate. Its ranks are found from its own rank and size: if it has
all ranks of a known communicator, MPI alone gives the order; if it has some of them,
Horovod's own allgather shows which.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm.admission import check_before
from mpi_ckpt.comm.horovod_checks import check_horovod, find_horovod, mark_horovods
from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import Tag
from mpi_ckpt.comm.ordering import Claim, order_ranks
from mpi_ckpt.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

_NAME = "mpi_ckpt.communicator"


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
