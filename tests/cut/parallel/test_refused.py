# SPDX-License-Identifier: Apache-2.0
"""What the ranks cannot save or restore together: one error on all, nothing is lost."""

import numpy as np
import pytest

from mpi_ckpt import ConcatState, ShardedArrayState
from mpi_ckpt.errors import (
    DivergedError,
    StageError,
    StateMismatchError,
)
from tests.cut import cuts
from tests.ranks import manager, same_error

WHOLE = cuts.whole_array((8, 6))


@pytest.fixture
def several(peers):
    if peers.size < 2:
        pytest.skip("needs a second rank")
    return peers


def state_of(boxes, whole=WHOLE, **options):
    return ShardedArrayState("field", {"x": cuts.blocks(whole, boxes)}, **options)


def save(root, state, peers, **options):
    with manager(root, state, comm=peers, **options) as ours:
        return ours.save(step=1)


def last(peers):
    return peers.rank == peers.size - 1


class TestSave:
    def test_a_hole_is_named(self, several, shared_path):
        boxes = [] if last(several) else cuts.rows(WHOLE.shape, several.size)[several.rank]
        ours = manager(shared_path, state_of(boxes), comm=several)
        ((first, _), (count, _)) = cuts.rows(WHOLE.shape, several.size)[-1][0]
        hole = f"[{first}:{first + count}, 0:6]"
        with same_error(several, StageError, "state 'field', leaf 'x'", "no rank", hole):
            ours.save()
        assert ours.generations() == []
        ours.close()

    def test_an_overlap_is_named_with_its_ranks(self, several, shared_path):
        boxes = cuts.rows(WHOLE.shape, several.size)[several.rank]
        if last(several):
            boxes = [*boxes, ((0, 0), (1, 3))]
        ours = manager(shared_path, state_of(boxes), comm=several)
        with same_error(several, StageError, "overlap", "[0:1, 0:3]", "rank"):
            ours.save()
        ours.close()

    @pytest.mark.parametrize(
        "other", [np.zeros((8, 6), "f4"), np.zeros((8, 7))], ids=["dtype", "shape"]
    )
    def test_ranks_that_disagree_are_named(self, several, shared_path, other):
        boxes = cuts.rows(WHOLE.shape, several.size)[several.rank]
        state = state_of(boxes, other if last(several) else WHOLE)
        ours = manager(shared_path, state, comm=several)
        with same_error(several, StageError, "leaf 'x'", f"rank {several.size - 1}"):
            ours.save()
        ours.close()

    @pytest.mark.parametrize("sync", ["check", "none"])
    def test_replicas_are_written_once_if_they_are_equal(self, several, shared_path, sync):
        everything = [((0, 0), (8, 6))]
        report = save(shared_path, state_of(everything, sync=sync), several)
        assert report.bytes_written < 2 * 8192 + WHOLE.nbytes

    def test_replicas_that_differ_are_named(self, several, shared_path):
        state = state_of([((0, 0), (8, 6))], WHOLE + last(several))
        ours = manager(shared_path, state, comm=several)
        where = "state 'field', leaf 'x', [0:8, 0:6]"
        with same_error(several, DivergedError, where, f"rank {several.size - 1}"):
            ours.save()
        ours.close()

    def test_a_rank_that_lacks_a_column_is_named(self, several, shared_path):
        columns = {"a": np.arange(3)} if last(several) else {}
        ours = manager(shared_path, ConcatState("rows", columns), comm=several)
        with same_error(several, StageError, "'a'", "lacks this column"):
            ours.save()
        ours.close()


class TestRestore:
    @pytest.fixture
    def saved(self, peers, shared_path):
        boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
        save(shared_path, state_of(boxes), peers)
        return shared_path

    @pytest.mark.parametrize(
        "other", [np.zeros((8, 6), "f4"), np.zeros((9, 6))], ids=["dtype", "shape"]
    )
    def test_another_whole_array_is_refused(self, peers, saved, other):
        boxes = cuts.rows(other.shape, peers.size)[peers.rank]
        ours = manager(saved, state_of(boxes, other), comm=peers)
        with same_error(peers, StateMismatchError, "x F64[8, 6] is saved"):
            ours.restore()
        ours.close()

    def test_an_array_that_nobody_wants_is_refused(self, peers, saved):
        state = ShardedArrayState("field", {})
        ours = manager(saved, state, comm=peers)
        with same_error(peers, StateMismatchError, "x F64[8, 6]"):
            ours.restore()
        ours.close()

    def test_an_array_that_nobody_wants_is_left_out_if_asked(self, peers, saved):
        with manager(
            saved, ShardedArrayState("field", {}), comm=peers, strict=False
        ) as ours:
            report = ours.restore()
        assert dict(report.unexpected_leaves) == {"field": ("x",)}
