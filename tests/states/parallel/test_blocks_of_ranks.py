# SPDX-License-Identifier: Apache-2.0
"""Blocks whose place in the whole is found from the parts of all ranks."""

from __future__ import annotations

import numpy as np
import pytest

from mpi_ckpt import Block, ShardedArrayState
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import RegistrationError


def test_rows_of_all_ranks_make_the_whole(comm):
    rows = 3 if comm.rank % 2 else comm.rank  # rank 0 has none
    block = Block.rows(np.zeros((rows + 2, 4)), comm, ghosts=1)
    counts = [3 if rank % 2 else rank for rank in range(comm.size)]
    assert block.shape == (sum(counts), 4)
    assert block.box == Box((sum(counts[: comm.rank]), 0), (rows, 4))
    state = ShardedArrayState("s", {"u": block})
    (leaf,) = state.capture().leaves
    assert [tile.box for tile in leaf.tiles] == ([block.box] if rows else [])


def test_a_grid_of_ranks_has_its_last_coordinate_fastest(comm):
    dims = (comm.size // 2, 2) if comm.size % 2 == 0 else (1, comm.size)
    row, column = divmod(comm.rank, dims[1])
    block = Block.grid(np.zeros((row + 1, column + 1)), dims, comm)
    assert block.offset == (sum(range(1, row + 1)), sum(range(1, column + 1)))
    assert block.shape == tuple(sum(range(1, n + 1)) for n in dims)


def test_no_rank_waits_for_a_rank_that_has_no_block(comm):
    last = comm.size - 1
    array = np.zeros(3) if comm.rank < last else [1.0]
    with pytest.raises(RegistrationError, match=f"rank {last}: the array of a block is a"):
        Block.rows(array, comm)
