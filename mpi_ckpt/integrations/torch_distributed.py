# SPDX-License-Identifier: Apache-2.0
"""Connects a torch.distributed job (DistributedDataParallel and the like) with MPI.

torch.distributed moves gradients, MPI moves checkpoints; both see the same processes. Start
the job with mpirun and let MPI give torch its ranks::

    init_process_group("gloo")
    with CheckpointManager("checkpoints", states, comm=communicator()) as manager:
        ...
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import Communicator, agree, on_root
from mpi_ckpt.comm.ordering import Claim, order_ranks
from mpi_ckpt.errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed import ProcessGroup

__all__ = ["communicator", "init_process_group"]

_LIBRARY = "torch.distributed"
_ADVICE = (
    "start it as `mpirun -n N python train.py`, not with torchrun, and call "
    "mpi_ckpt.integrations.torch_distributed.init_process_group, which gives torch the "
    "ranks of MPI"
)
# All ranks are already running: they have just started, or have met in torch.
_MEETING_SECONDS = 120.0


def init_process_group(
    backend: str | None = None,
    *,
    comm: MPI.Intracomm | None = None,
    timeout_seconds: float = 1800.0,
) -> None:
    """Start torch.distributed with the ranks of MPI.

    Collective. Main thread only. It needs no environment variables: rank and size are
    MPI's, and the ranks meet at a free port of root's host.

    Args:
        backend: As for ``torch.distributed.init_process_group``.
        comm: Communicator of the ranks; None is the world.
        timeout_seconds: How long a torch operation may take.

    Raises:
        LaunchError: On every rank, if torch.distributed is already started, or a rank
            cannot be reached.
    """
    dist = _distributed()
    ours = Communicator(comm, deadline_seconds=_MEETING_SECONDS)
    doing = f"starting {_LIBRARY}"
    timeout = timedelta(seconds=timeout_seconds)
    on_one_host = len(set(ours.hosts)) == 1
    host = "127.0.0.1" if on_one_host else ours.hosts[0]

    stores: list[Any] = []

    def connect(port: int) -> None:
        # The store chooses the port, so that no other job can take it in between.
        stores.append(
            dist.TCPStore(
                host, port, ours.size, ours.is_root, timeout, wait_for_workers=False
            )
        )

    def refuse_again() -> None:
        if dist.is_initialized():
            raise LaunchError(f"{_LIBRARY} is initialised already")

    def listen() -> int:
        connect(0)
        port: int = stores[0].port
        return port

    agree(ours, doing, refuse_again, error=LaunchError)
    port: int = on_root(ours, doing, listen, error=LaunchError)

    def join() -> None:
        if not ours.is_root:
            connect(port)

    agree(ours, doing, join, error=LaunchError)
    (store,) = stores

    def start() -> None:
        dist.init_process_group(
            backend, store=store, rank=ours.rank, world_size=ours.size, timeout=timeout
        )

    agree(ours, doing, start, error=LaunchError)
    ours.close()


def communicator(
    group: ProcessGroup | None = None, *, comm: MPI.Intracomm | None = None
) -> MPI.Intracomm | None:
    """Make a communicator whose ranks are those of torch.distributed.

    Collective over all processes of MPI, also with a group. Main thread only. Only its
    creation costs time. Call ``Free()`` on it, or leave it to MPI_Finalize.

    Args:
        group: This rank's process group; one call may make several groups, if each rank
            passes its own. None: all ranks. A rank in no group passes the ``group`` that
            ``torch.distributed.new_group`` has returned to it.
        comm: Communicator of all processes of the job; None is the world.

    Returns:
        The communicator for `mpi_ckpt.CheckpointManager`; None for a rank outside of its
        group.

    Raises:
        LaunchError: On every rank, if torch.distributed is not initialised, or its ranks do
            not fit MPI's, for example if every process is an MPI job of one.
        CollectiveError: On every live rank, if one never arrives.
    """

    def ask() -> Claim:
        dist = _distributed()
        if not dist.is_initialized():
            raise LaunchError(
                f"{_LIBRARY} is not initialised, so its ranks are not known: call "
                "mpi_ckpt.integrations.torch_distributed.init_process_group first"
            )
        rank = dist.get_rank(group)
        if rank < 0:
            return Claim(None, rank, 0)
        first = 0 if group is None else dist.get_global_rank(group, 0)
        return Claim(first, rank, dist.get_world_size(group))

    return order_ranks(
        comm,
        ask,
        library=_LIBRARY,
        advice=_ADVICE,
        deadline_seconds=_MEETING_SECONDS,
    )


def _distributed() -> Any:  # noqa: ANN401 (a module)
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise LaunchError(
            f"{_LIBRARY} needs torch ({error}): pip install 'mpi_ckpt[torch]'"
        ) from error
    if not dist.is_available():
        raise LaunchError(f"this torch was built without {_LIBRARY}")
    return dist
