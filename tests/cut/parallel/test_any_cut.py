# SPDX-License-Identifier: Apache-2.0
"""Arrays that are cut over ranks: saved by any number of ranks, restored by any other."""

from itertools import product

import pytest

from mpi_ckpt import ShardedArrayState
from tests.cut import cuts
from tests.ranks import manager, on_first


def save(comm, root, size, whole, cut, **options):
    def work(part):
        state = ShardedArrayState("field", {"x": cuts.blocks(whole, cut[part.rank])})
        with manager(root, state, comm=part, **options) as ours:
            return ours.save(step=1)

    return on_first(comm, size, work)


def restore(
    comm, root, size, whole, cut, *, ghosts=0, periodic=False, order="C", **options
):
    def work(part):
        mine = cuts.blocks(
            whole,
            cut[part.rank],
            ghosts=ghosts,
            periodic=periodic,
            filled=False,
            order=order,
        )
        state = ShardedArrayState("field", {"x": mine})
        with manager(root, state, comm=part, **options) as ours:
            report = ours.restore()
        for block, (offset, length) in zip(mine, cut[part.rank], strict=True):
            want = cuts.expected(whole, offset, length, ghosts=ghosts, periodic=periodic)
            assert block.array.tobytes() == want.tobytes(), (offset, length)
        return report

    return on_first(comm, size, work)


def pairs(comm):
    return product(range(1, comm.size + 1), repeat=2)


@pytest.mark.parametrize("there", cuts.CUTS, ids=lambda cut: cut.__name__)
@pytest.mark.parametrize("here", cuts.CUTS, ids=lambda cut: cut.__name__)
def test_any_cut_on_any_ranks_gives_any_other(peers, shared_path, there, here):
    whole = cuts.whole_array(cuts.SHAPE)
    for n, m in pairs(peers):
        root = shared_path / f"{n}-{m}"
        save(peers, root, n, whole, there(cuts.SHAPE, n))
        report = restore(peers, root, m, whole, here(cuts.SHAPE, m))
        if report is not None:
            assert report.bytes_read >= whole.nbytes


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("ghosts", [1, 2])
def test_ghost_cells_come_from_their_owners(peers, shared_path, ghosts, periodic):
    whole = cuts.whole_array(cuts.SHAPE)
    save(peers, shared_path, peers.size, whole, cuts.columns(cuts.SHAPE, peers.size))
    for m, cut in product(range(1, peers.size + 1), (cuts.grid, cuts.several)):
        boxes = cut(cuts.SHAPE, m)
        restore(peers, shared_path, m, whole, boxes, ghosts=ghosts, periodic=periodic)
