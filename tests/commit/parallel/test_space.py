# SPDX-License-Identifier: Apache-2.0
"""A save that does not fit is refused on all ranks before it is begun."""

import numpy as np
import pytest

from mpi_ckpt import ArrayState
from mpi_ckpt.errors import WriteError
from mpi_ckpt.storage.writing import space
from tests.directories import names_in
from tests.ranks import manager, same_error


def fill_disk(monkeypatch, nbytes):
    """Let the disk of this rank have so much room."""
    monkeypatch.setattr(space, "free_space", lambda path: space.FreeSpace(nbytes, 100))
    monkeypatch.setattr(space, "_can_reserve", lambda probe, nbytes: False)


def names(path):
    return [name for name in names_in(path) if name != ".lock"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("writers", ["root", "all"])
def test_all_ranks_hear_what_is_needed_and_what_is_free(
    comm, shared_path, monkeypatch, writers, asynchronous
):
    arrays = {name: np.zeros(1000) for name in "abcdefgh"}
    options = {"writers": writers, "asynchronous": asynchronous}
    with manager(shared_path, ArrayState("arrays", arrays), **options) as checkpoints:
        checkpoints.save().wait()
        for array in arrays.values():
            array[:] = 1
        # Among several writers it is the last that finds its disk full, else root.
        full = comm.size - 1 if writers == "all" else 0
        with monkeypatch.context() as patch:
            if comm.rank == full:
                fill_disk(patch, 1234)
            told = ["1,234 bytes and 100 files free", "nothing of it was written"]
            with same_error(comm, WriteError, f"rank {full} of {comm.size}", *told):
                checkpoints.save().wait()
        assert names(shared_path) == ["checkpoint-00000001"]
        comm.barrier()
        assert checkpoints.save().wait().generation == 2
        assert checkpoints.restore().generation == 2
