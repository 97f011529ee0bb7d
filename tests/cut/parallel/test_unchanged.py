# SPDX-License-Identifier: Apache-2.0
"""Tiles that have not changed since the last save are shared with it, not written."""

import numpy as np

from mpi_ckpt import ShardedArrayState
from mpi_ckpt.options import IO
from tests.cut import cuts
from tests.ranks import manager

WHOLE = np.arange(4800.0).reshape(12, 400)


def states_of(peers, *, filled=True):
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    return [
        ShardedArrayState(name, {"x": cuts.blocks(WHOLE, boxes, filled=filled)})
        for name in ("mesh", "flow")
    ]


def change(state):
    for block in state.blocks["x"]:
        np.add(block.array, 1, out=block.array)


def files_of(report):
    return sorted(path.name for path in report.path.glob("tiles-*"))


def restores(peers, root, *added):
    again = states_of(peers, filled=False)
    with manager(root, *again, comm=peers) as ours:
        ours.restore()
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    for state, more in zip(again, added, strict=True):
        for block, box in zip(state.blocks["x"], boxes, strict=True):
            want = WHOLE[cuts.box_slices(*box)] + more
            np.testing.assert_array_equal(block.array, want)


def test_a_save_of_the_same_writes_no_tile(peers, shared_path):
    with manager(shared_path, *states_of(peers), comm=peers) as ours:
        ours.save()
        again = ours.save().wait()
    assert again.bytes_reused == 2 * WHOLE.nbytes
    assert again.bytes_written < WHOLE.nbytes
    assert all(".from-00000001" in name for name in files_of(again))
    restores(peers, shared_path, 0, 0)


def test_a_changed_state_is_written_beside_one_that_is_shared(peers, shared_path):
    mesh, flow = states_of(peers)
    with manager(shared_path, mesh, flow, comm=peers) as ours:
        ours.save()
        change(flow)
        second = ours.save().wait()
        assert second.bytes_reused == WHOLE.nbytes
        change(flow)
        ours.save()
    restores(peers, shared_path, 0, 2)


def test_one_changed_rank_writes_alone(peers, shared_path):
    mesh, flow = states_of(peers)
    with manager(shared_path, mesh, flow, comm=peers) as ours:
        ours.save()
        if peers.rank == 0:
            change(mesh)
            change(flow)
        report = ours.save().wait()
    written = [name for name in files_of(report) if "from" not in name]
    assert written == ["tiles-00000.safetensors"]


def test_a_file_of_which_little_is_left_is_written_again(peers, shared_path):
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    small = ShardedArrayState(
        "small",
        {
            "x": cuts.blocks(
                WHOLE[:, :40].copy(),
                boxes and [(offset, (shape[0], 40)) for offset, shape in boxes],
            )
        },
    )
    large = states_of(peers)[0]
    with manager(shared_path, small, large, comm=peers) as ours:
        ours.save()
        change(large)
        assert ours.save().wait().bytes_reused == 0


def test_shared_files_are_written_again_in_time(peers, shared_path):
    io = IO(full_every=2)
    with manager(shared_path, *states_of(peers), comm=peers, io=io) as ours:
        reused = [ours.save().wait().bytes_reused for _ in range(4)]
    assert reused == [0, 2 * WHOLE.nbytes, 0, 2 * WHOLE.nbytes]


def test_nothing_is_shared_if_so_asked(peers, shared_path):
    io = IO(reuse=False)
    with manager(shared_path, *states_of(peers), comm=peers, io=io) as ours:
        assert [ours.save().wait().bytes_reused for _ in range(2)] == [0, 0]


def test_an_asynchronous_save_shares_too(peers, shared_path):
    with manager(shared_path, *states_of(peers), comm=peers, asynchronous=True) as ours:
        ours.save().wait()
        assert ours.save().wait().bytes_reused == 2 * WHOLE.nbytes
    restores(peers, shared_path, 0, 0)
