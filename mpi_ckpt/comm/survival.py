# SPDX-License-Identifier: Apache-2.0
"""Does this job survive a lost rank? And is an error the sign of one?

MPI's fault tolerance (ULFM): an operation that needs a dead rank raises, the communicator
can be revoked, which wakes whoever waits in it, and shrunk to those that live.
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
# MPI: what `mpirun --with-ft ulfm` sets for its ranks, spawned ones too. Without it Open
# MPI has all of the calls, and ends the job all the same.
_VARIABLE = "OMPI_MCA_mpi_ft_enable"


def why_lost_ranks_end_the_job(environ: Mapping[str, str] = os.environ) -> str:
    """Say why MPI will end this job when a rank dies; empty if it will not.

    Not collective. Starts MPI.
    """
    mpi = load_mpi()
    name, version = mpi.get_vendor()
    library = f"{name} {'.'.join(map(str, version))}"
    if name != "Open MPI" or version < (5,):
        return f"{library} cannot; Open MPI from version 5 on can"
    if environ.get(_VARIABLE, "").lower() not in ("1", "true", "yes", "enabled"):
        return f"{library} was started without it; `mpirun --with-ft ulfm` asks for it"
    return ""


def is_rank_failure(error: BaseException) -> bool:
    """Return whether an exception, or one that it came from, is MPI's word for a lost rank.

    Not collective. A missed deadline is none: who is late still lives. Starts no MPI.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None:
        return False
    classes = {getattr(mpi, name) for name in _CLASSES if hasattr(mpi, name)}
    return any(
        isinstance(one, mpi.Exception) and one.Get_error_class() in classes
        for one in _chain(error)
    )


def is_sign_of_loss(error: BaseException, handle: MPI.Intracomm) -> bool:
    """Return whether an exception comes from a lost rank, by what else MPI knows.

    Not collective. Main thread only.

    Args:
        error: What a call on the communicator, or on one made from it, has led to.
        handle: The communicator.
    """
    if not isinstance(error, Exception):
        return False  # whoever leaves by sys.exit(), or Ctrl-C, means it
    if is_rank_failure(error):
        return True
    # MPI: a connection that breaks off is at times reported as what it is.
    kind = load_mpi().Exception
    return any(isinstance(one, kind) for one in _chain(error)) and _has_lost_ranks(handle)


def _has_lost_ranks(handle: MPI.Intracomm) -> bool:
    failed = handle.Get_failed()
    size: int = failed.size
    failed.Free()
    return size > 0


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            pending += [one.__cause__, one.__context__]
