# SPDX-License-Identifier: Apache-2.0
"""Saves on all ranks and restores: shows that an installation works."""

from __future__ import annotations

import tempfile

import numpy as np
from mpi4py import MPI

import mpi_ckpt

comm = MPI.COMM_WORLD


def main() -> None:
    """Save, spoil the array, restore it; rank 0 prints what it ran on."""
    root = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    array = np.arange(1000.0)
    states = [mpi_ckpt.ArrayState("array", {"x": array}), mpi_ckpt.RNGState()]
    with mpi_ckpt.CheckpointManager(root, states) as manager:
        manager.save(step=7)
        array[:] = comm.rank
        report = manager.restore()
    assert report is not None
    assert report.step == 7
    assert report.size == comm.size
    assert (array == np.arange(1000.0)).all()
    if comm.rank == 0:
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        print(f"{comm.size} ranks saved and restored on {library}")


main()
