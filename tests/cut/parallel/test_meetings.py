# SPDX-License-Identifier: Apache-2.0
"""How often the ranks meet to save and restore what is cut over them."""

import numpy as np
import pytest

from mpi_ckpt import ArrayState, Block, ShardedArrayState
from mpi_ckpt.comm.roster import children_of
from mpi_ckpt.storage.reading.file_reader import FileReader
from tests.programs.meetings import counted_meetings
from tests.ranks import manager

COMPARING = "comparing how leaves are cut over the ranks"
MOST = 10


def fields(comm, rows=4):
    array = np.full((rows, 3), comm.rank, np.int64)
    return ShardedArrayState("fields", {"x": Block.rows(array, comm)})


def meetings_of(act):
    with counted_meetings() as meetings:
        act()
    return meetings


def without(meetings, added):
    left = list(meetings)
    for one in added:
        left.remove(one)
    return left


def test_a_save_of_unchanged_boxes_compares_them_once(peers, shared_path):
    with manager(shared_path, fields(peers), comm=peers) as ours:
        first = meetings_of(ours.save)
        later = [meetings_of(ours.save) for _ in range(2)]
    assert first.count(COMPARING) > 1
    assert [meetings.count(COMPARING) for meetings in later] == [1, 1]


def test_a_rank_with_other_boxes_makes_all_ranks_compare_them(peers, shared_path):
    state = fields(peers)
    with manager(shared_path, state, comm=peers) as ours:
        first = meetings_of(ours.save)
        ours.save()
        rows = 6 if peers.rank == peers.size - 1 else 4
        array = np.zeros((rows, 3), np.int64)
        state.blocks["x"] = Block.rows(array, peers)
        assert meetings_of(ours.save) == first


@pytest.mark.parametrize("writers", ["root", "all"])
def test_a_save_of_unchanged_boxes_meets_hardly_more_often_than_any(
    peers, shared_path, writers
):
    whole = {str(n): np.full(10, n) for n in range(8)}
    saved = manager(shared_path / "w", ArrayState("w", whole), comm=peers, writers="all")
    with saved as ours:
        ours.save()
        shared = meetings_of(ours.save)
    with manager(shared_path / "x", fields(peers), comm=peers, writers=writers) as ours:
        ours.save()
        cut = meetings_of(ours.save)
    # A rank between root and others waits once for those, and once until it has sent.
    is_between = peers.rank > 0 and bool(children_of(peers.rank, peers.size))
    through_the_tree = 2 if is_between else 1
    # What comes to the meetings of a save of whole leaves by several writers.
    added = [COMPARING, "joining a generation", *["publishing"] * through_the_tree]
    dealt = ["sharing out a save"] * through_the_tree
    if writers == "root":  # one broadcast in place of a scatter
        added, shared = [*added, "beginning a generation"], without(shared, dealt)
    assert sorted(without(cut, added)) == sorted(shared)
    assert len(cut) <= MOST + 2 * is_between


def test_a_restore_of_cut_state_meets_once_a_turn(peers, shared_path):
    with manager(shared_path, fields(peers), comm=peers) as ours:
        ours.save()
        meetings = meetings_of(ours.restore)
    # The boxes are small: one turn. Nothing is sent, since each rank reads its own.
    assert meetings.count("reading a generation") == 1
    assert "sending a generation" not in meetings


def test_ranks_read_the_lists_of_tiles_in_turn(peers, shared_path, monkeypatch):
    read, real = [], FileReader.read_header

    def counted(self, file, *most):
        read.append(file.name)
        return real(self, file, *most)

    monkeypatch.setattr(FileReader, "read_header", counted)
    with manager(shared_path, fields(peers), comm=peers) as ours:
        ours.save()
        ours.restore()
    assert read == [f"tiles-{peers.rank:05d}.safetensors"]
