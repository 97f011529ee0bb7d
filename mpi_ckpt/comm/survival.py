# SPDX-License-Identifier: Apache-2.0
"""Finds out whether a job survives a lost rank, and whether an error comes from one.

MPI's fault tolerance (ULFM): an operation that needs a dead rank raises, the communicator
can be revoked, which wakes all ranks that wait in it, and shrunk to the live ranks.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from mpi_ckpt.comm.launch import load_mpi

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mpi4py import MPI

_CLASSES = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
# MPI: `mpirun --with-ft ulfm` sets it for its ranks, spawned ones too. Without it Open MPI
# has all of the calls, but still ends the job.
_VARIABLE = "OMPI_MCA_mpi_ft_enable"


def why_lost_ranks_end_the_job(environ: Mapping[str, str] = os.environ) -> str:
    """Return why MPI will end this job when a rank dies; empty if it will not.

    Not collective. Starts MPI.
    """
    mpi = load_mpi()
    name, version = mpi.get_vendor()
    library = f"{name} {'.'.join(map(str, version))}"
    if name != "Open MPI" or version < (5,):
        return f"{library} cannot survive it; Open MPI can from version 5 on"
    if environ.get(_VARIABLE, "").lower() not in ("1", "true", "yes", "enabled"):
        return (
            f"{library} was started without fault tolerance; start it with "
            "`mpirun --with-ft ulfm`"
        )
    return ""


def is_rank_failure(error: BaseException) -> bool:
    """Return whether an exception, or one of its causes, is MPI's error for a lost rank.

    Not collective. A missed deadline is not one: a late rank still lives. Starts no MPI.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None:
        return False
    classes = {getattr(mpi, name) for name in _CLASSES if hasattr(mpi, name)}
    return any(
        isinstance(cause, mpi.Exception) and cause.Get_error_class() in classes
        for cause in _chain(error)
    )


def is_sign_of_loss(error: BaseException, handle: MPI.Intracomm) -> bool:
    """Return whether an exception comes from a lost rank, by MPI's other evidence.

    Not collective. Main thread only.

    Args:
        error: Exception of a call on the communicator, or on one made from it.
        handle: The communicator.
    """
    if not isinstance(error, Exception):
        return False  # sys.exit() and Ctrl-C are intended
    if is_rank_failure(error):
        return True
    # MPI: a broken connection is sometimes reported as such.
    kind = load_mpi().Exception
    return any(isinstance(cause, kind) for cause in _chain(error)) and has_lost_ranks(
        handle
    )


def has_lost_ranks(handle: MPI.Intracomm) -> bool:
    """Return whether this rank knows of lost ranks that MPI survived. Not collective.

    All ranks know of those that an agreement on the communicator has raised for.
    """
    return not why_lost_ranks_end_the_job() and bool(lost_ranks(handle))


def live_ranks_before(handle: MPI.Intracomm) -> int:
    """Return how many ranks of a lower number live, as far as this rank knows.

    Not collective. Only for a job that survives lost ranks.

    Args:
        handle: The communicator.
    """
    ours: int = handle.rank
    return ours - sum(rank < ours for rank in lost_ranks(handle))


def lost_ranks(handle: MPI.Intracomm) -> list[int]:
    """Return the lost ranks that this rank knows of.

    Not collective. Only for a job that survives lost ranks.

    Args:
        handle: The communicator.
    """
    failed, everyone = handle.Get_failed(), handle.Get_group()
    ranks: list[int] = failed.Translate_ranks(None, everyone)
    failed.Free()
    everyone.Free()
    return ranks


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        cause = pending.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            pending += [cause.__cause__, cause.__context__]
