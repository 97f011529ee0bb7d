# SPDX-License-Identifier: Apache-2.0
"""With one writer for each host, the others hand their tiles over, a piece at a time."""

import numpy as np
import pytest

from mpi_ckpt import ConcatState, ShardedArrayState
from mpi_ckpt.engine.save.cut import carrying
from mpi_ckpt.errors import SaveError
from tests.cut import cuts
from tests.ranks import manager, same_error

WHOLE = cuts.whole_array((12, 7, 3))
SMALL = cuts.whole_array((6, 4), np.uint8)


def states_of(peers, cut=cuts.columns, *, filled=True, ghosts=0):
    def blocks(whole):
        boxes = cut(whole.shape, peers.size)[peers.rank]
        return cuts.blocks(whole, boxes, filled=filled, ghosts=ghosts)

    return [
        ShardedArrayState("b", {"x": blocks(WHOLE), "a": blocks(SMALL)}),
        ConcatState("a", {"i": np.arange(peers.rank * 5.0) * filled}),
        # Equal on all ranks: digested beforehand, and written once.
        ShardedArrayState("same", {"y": cuts.blocks(SMALL, [((0, 0), (6, 4))])}),
    ]


@pytest.mark.parametrize("piece_bytes", [1, 50, 1 << 20])
@pytest.mark.parametrize("cut", [cuts.columns, cuts.several, cuts.last_has_all])
def test_a_host_has_one_file(peers, shared_path, monkeypatch, cut, piece_bytes):
    monkeypatch.setattr(carrying, "_PIECE_BYTES", piece_bytes)
    with manager(
        shared_path, *states_of(peers, cut, ghosts=1), comm=peers, writers="node"
    ) as m:
        m.save()
        report = m.save().wait()
    assert [path.name for path in report.path.glob("tiles-*")] == [
        "tiles-00000.safetensors"
    ]
    again = states_of(peers, filled=False)
    with manager(shared_path, *again, comm=peers) as ours:
        ours.restore()
    for block in again[0].blocks["x"]:
        want = WHOLE[cuts.box_slices(block.offset, block.array.shape)]
        assert block.array.tobytes() == want.tobytes()


def test_hosts_have_a_file_each(peers, shared_path, on_hosts):
    on_hosts("abab")
    with manager(shared_path, *states_of(peers), comm=peers, writers="node") as ours:
        found = ours.save().wait().path.glob("tiles-*")
        names = [f"tiles-{rank:05d}.safetensors" for rank in range(min(2, peers.size))]
        assert sorted(path.name for path in found) == names


@pytest.mark.parametrize("failing", ["first", "last"])
def test_a_rank_that_cannot_write_or_read_fails_all(
    peers, shared_path, monkeypatch, failing
):
    states = states_of(peers)
    ours = manager(shared_path, *states, comm=peers, writers="node")
    ours.save()

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    rank = 0 if failing == "first" else peers.size - 1
    where = "mpi_ckpt.engine.save.cut.own_tiles.write_tile_file"
    if rank:
        where = "mpi_ckpt.engine.save.cut.carrying.runs_of"
    with monkeypatch.context() as patch:
        if peers.rank == rank:
            patch.setattr(where, broken)
        with same_error(peers, SaveError, f"rank {rank}", "No space left"):
            ours.save()
    ours.save()
    assert [info.generation for info in ours.generations()][-1] >= 2
    ours.close()


def test_root_that_cannot_share_out_fails_all(peers, shared_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no shares")

    ours = manager(shared_path, *states_of(peers), comm=peers)
    with monkeypatch.context() as patch:
        patch.setattr("mpi_ckpt.engine.save.writers.share_out", broken)
        with same_error(peers, SaveError, "rank 0", "no shares"):
            ours.save()
    assert not list(shared_path.glob(".partial-*"))
    assert ours.save().wait().generation == 1
    ours.close()
