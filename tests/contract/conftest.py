# SPDX-License-Identifier: Apache-2.0
"""Settings of the contract tests: one process, one rank, no mpirun."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from mpi4py import MPI

import mpi_ckpt


@pytest.fixture(autouse=True)
def seeded():
    """Give every test the same random streams."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


@pytest.fixture
def manage(tmp_path):
    """Make managers of one rank over one directory; all are closed when the test ends."""
    made = []

    def make(*states, root=tmp_path, **options) -> mpi_ckpt.CheckpointManager:
        options = mpi_ckpt.Options(preemption_signals=(), **options)
        made.append(
            mpi_ckpt.CheckpointManager(root, states, comm=MPI.COMM_SELF, options=options)
        )
        return made[-1]

    yield make
    for manager in reversed(made):
        manager.close()
