# SPDX-License-Identifier: Apache-2.0
"""Checks whether Horovod in the same process fits this MPI. Nothing here imports Horovod.

Horovod has its own thread that calls MPI. If that thread started MPI, `hvd.shutdown`
finalizes MPI for the whole process. If Horovod runs without MPI, or with other ranks, the
two libraries do not mean the same job.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpi4py import MPI

_FRONT_ENDS = ("horovod.torch", "horovod.tensorflow", "horovod.keras", "horovod.mxnet")

_FIRST = (
    "import mpi4py.MPI before hvd.init(): if Horovod starts MPI, hvd.shutdown() ends it "
    "for the whole process"
)

# This attribute marks a communicator of the ranks of a process set: fewer ranks than
# Horovod has, but correct. It is made on first use, since it needs MPI.
_KEYVALS: list[int] = []


def find_horovod(modules: Mapping[str, Any] = sys.modules) -> Any:  # noqa: ANN401 (a module)
    """Return the front end of Horovod that the program has initialised, or None.

    Not collective. Thread-safe.

    Args:
        modules: Modules that have been imported.
    """
    for name in _FRONT_ENDS:
        horovod = modules.get(name)
        if horovod is not None and horovod.is_initialized():
            return horovod
    return None


def check_finalized(mpi: Any) -> None:  # noqa: ANN401 (a module)
    """Refuse an MPI that was finalized: any call would end the process without a message.

    Not collective.

    Args:
        mpi: ``mpi4py.MPI``.

    Raises:
        LaunchError: On every rank, since each sees the same.
    """
    if mpi.Is_finalized():
        raise LaunchError(
            "MPI has been finalized in this process and cannot be started again; if that "
            f"was hvd.shutdown(): {_FIRST}"
        )


def check_horovod(
    mpi: Any,  # noqa: ANN401 (a module)
    size: int,
    modules: Mapping[str, Any] = sys.modules,
    *,
    is_part: bool = False,
) -> None:
    """Refuse a Horovod that does not work with this MPI, or means another job.

    Not collective. Checks only if the program has imported and initialised Horovod.

    Args:
        mpi: ``mpi4py.MPI``.
        size: Number of ranks of the communicator to be used.
        modules: Modules that have been imported.
        is_part: Whether the ranks are known to be those of a process set.

    Raises:
        LaunchError: On the calling rank; others may not see the same.
    """
    horovod = find_horovod(modules)
    if horovod is None:
        return
    if not horovod.mpi_enabled() or (horovod.size() != size and not is_part):
        raise LaunchError(
            f"Horovod runs {horovod.size()} ranks "
            f"({'over MPI' if horovod.mpi_enabled() else 'without MPI'}), the "
            f"communicator has {size}: start with `mpirun`, or `horovodrun` without "
            "--gloo and HOROVOD_CONTROLLER=gloo, and give CheckpointManager the "
            "communicator that Horovod has: comm="
            "mpi_ckpt.integrations.horovod.communicator()"
        )
    # Off Python's main thread, the main thread of MPI proves nothing.
    on_main = threading.current_thread() is threading.main_thread()
    if on_main and not mpi.Is_thread_main():
        raise LaunchError(f"Horovod's thread has started MPI, not this one; {_FIRST}")
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise LaunchError(
            "MPI was started for calls from one thread at a time, and Horovod's thread "
            "calls it at any time: leave mpi4py.rc.thread_level at its default, "
            "'multiple', or let the code that starts MPI ask for that level"
        )


def mark_horovods(mpi: Any, comm: MPI.Intracomm) -> None:  # noqa: ANN401 (a module)
    """Note that a communicator has the ranks of a process set. Not collective."""
    if not _KEYVALS:
        _KEYVALS.append(mpi.Comm.Create_keyval())
    comm.Set_attr(_KEYVALS[0], True)


def is_horovods(comm: MPI.Intracomm) -> bool:
    """Return whether a communicator was marked by `mark_horovods`. Not collective."""
    return bool(_KEYVALS) and comm.Get_attr(_KEYVALS[0]) is not None
