# SPDX-License-Identifier: Apache-2.0
"""Makes a communicator of Horovod's ranks for this package."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import Communicator, compare_texts
from mpi_ckpt.comm.ordering import find_communicator
from mpi_ckpt.errors import CheckpointError, OptionsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpi4py import MPI

__all__ = ["attached", "communicator"]


def communicator(
    comm: MPI.Intracomm | None = None,
    process_set: Any = None,  # noqa: ANN401 (hvd.ProcessSet)
    *,
    deadline_seconds: float = 600.0,
) -> MPI.Intracomm:
    """Return a communicator with Horovod's ranks: its rank is ``hvd.rank()``.

    Collective over these ranks. Main thread only. For ``CheckpointManager(...,
    comm=communicator())``. Call it again after ``hvd.shutdown(); hvd.init()`` if the ranks
    may have changed.

    Args:
        comm: The communicator given to ``hvd.init(comm=...)``, if you have it: messages on
            it then prove it. None: all ranks of the job, or, if Horovod has fewer, those
            that its allgather finds.
        process_set: A ``hvd.ProcessSet`` that was added: its ranks, in its order; only they
            call this. None: all of Horovod's ranks.
        deadline_seconds: How long the other ranks may take.

    Returns:
        ``comm`` or the world, if it already has Horovod's ranks in order; else a new one,
        which you must free. Without Horovod initialised: ``comm``, or the world.

    Raises:
        LaunchError: On each of these ranks, if Horovod runs without MPI (Gloo) or has other
            ranks, if its thread and not mpi4py has started MPI, or if MPI was not started
            for several threads.
        CollectiveError: On every live rank, if one never arrives.
    """
    return find_communicator(comm, process_set, deadline_seconds=deadline_seconds)[0]


@contextmanager
def attached(
    root_rank: int,
    process_set: Any,  # noqa: ANN401 (hvd.ProcessSet)
    comm: MPI.Intracomm | None,
    deadline_seconds: float,
) -> Iterator[Communicator]:
    """Yield a private communicator for one broadcast, with its root.

    Collective. Main thread only.

    Args:
        root_rank: Horovod's number among all of its ranks, also with a process set.
        process_set: See `communicator`.
        comm: See `communicator`.
        deadline_seconds: How long a wait may take.

    Raises:
        OptionsError: On every rank, if the roots differ or there is no such rank.
        LaunchError: On every rank, see `communicator`.
    """
    found, is_new = find_communicator(comm, process_set, deadline_seconds=deadline_seconds)
    private = Communicator(found, deadline_seconds=deadline_seconds)
    if is_new:
        found.Free()
    try:
        private.root = _root(private, root_rank, process_set)
        yield private
    except CheckpointError:
        # All ranks agreed on the error: every rank is here.
        private.close()
        raise
    private.close()


def _root(private: Communicator, root_rank: int, process_set: Any) -> int:  # noqa: ANN401
    problems = compare_texts(private, "comparing root_rank", [str(root_rank)])
    if problems:
        raise OptionsError(
            "the ranks were given different root ranks:\n  " + "\n  ".join(problems),
            problems=problems,
        )
    ranks = list(range(private.size))
    if process_set is not None and process_set.process_set_id != 0:
        ranks = list(process_set.ranks)
    if root_rank not in ranks:
        raise OptionsError(f"root_rank is {root_rank}, the ranks are {ranks}")
    return ranks.index(root_rank)
