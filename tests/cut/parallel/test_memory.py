# SPDX-License-Identifier: Apache-2.0
"""Cut state in a `Memory`: copies on two ranks, from which any ranks go on."""

import logging
from itertools import pairwise

import numpy as np
import pytest

from mpi_ckpt import ArrayState, CheckpointManager, ConcatState, Options, ShardedArrayState
from mpi_ckpt.elastic import Memory
from mpi_ckpt.engine.save import copies
from mpi_ckpt.errors import RestoreError, StageError
from tests.cut import cuts
from tests.cut.parallel.test_with_others import WHOLE, holds, states_of
from tests.ranks import manager, on_first, same_error


def managed(root, states, comm, memory, **options):
    options = Options(preemption_signals=(), deadline_seconds=35, **options)
    return CheckpointManager(
        root, list(states.values()), comm=comm, options=options, memory=memory
    )


def spoil(states):
    for block in states["field"].blocks["x"]:
        block.array[...] = -1
    states["whole"].arrays["a"][...] = -1
    states["rows"].arrays["i"] = np.zeros(1, np.int64)


@pytest.mark.parametrize("holders", ["all", "root"])
@pytest.mark.parametrize("cut", [cuts.rows, cuts.several, cuts.last_has_all])
def test_a_copy_is_brought_back_without_a_file(peers, shared_path, cut, holders):
    boxes = cut(WHOLE.shape, peers.size)[peers.rank]
    states, memory = states_of(boxes, rank=peers.rank), Memory(holders)
    with managed(shared_path, states, peers, memory) as ours:
        ours.remember(step=3)
        spoil(states)
        report = ours.restore()
    assert report.from_memory
    assert report.step == 3
    assert not list(shared_path.glob("checkpoint-*"))
    holds(states, boxes, peers.size, peers.size)


@pytest.mark.parametrize(
    "options",
    [{}, {"asynchronous": True}, {"writers": "node"}, {"writers": "all"}],
    ids=str,
)
def test_a_save_leaves_a_copy_with_tiles(peers, shared_path, options):
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    states, memory = states_of(boxes, rank=peers.rank), Memory()
    with managed(shared_path, states, peers, memory, **options) as ours:
        ours.save(step=1).wait()
        spoil(states)
        assert ours.restore().from_memory
        holds(states, boxes, peers.size, peers.size)
        memory.clear()
        spoil(states)
        assert not ours.restore().from_memory
    holds(states, boxes, peers.size, peers.size)


@pytest.mark.parametrize("cut", [cuts.columns, cuts.several, cuts.last_has_all])
def test_the_ranks_that_are_left_go_on_with_another_cut(peers, shared_path, cut):
    """The last rank is lost; the one after it, root, has its tiles."""
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    memory = Memory()
    with managed(shared_path, states_of(boxes, rank=peers.rank), peers, memory) as ours:
        ours.remember(step=5)
    few = peers.size - 1

    def restore(part):
        here = cut(WHOLE.shape, few)[part.rank]
        again = states_of(here, filled=False, rank=part.rank)
        with managed(shared_path, again, part, memory) as theirs:
            report = theirs.restore()
            theirs.remember()
        assert report.from_memory
        assert (report.step, report.saved_size) == (5, peers.size)
        holds(again, here, peers.size, few)

    on_first(peers, few, restore)


def test_new_ranks_get_tiles_from_those_that_have_them(peers, shared_path):
    """As if all but the last two ranks were new: they come with an empty memory."""
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    states, memory = states_of(boxes, rank=peers.rank), Memory()
    with managed(shared_path, states, peers, memory) as ours:
        ours.remember(step=5)
    if 0 < peers.rank < peers.size - 1:
        memory = Memory()
    spoil(states)
    with managed(shared_path, states, peers, memory) as ours:
        if peers.size > 3:  # two ranks in a row are lost, and some tiles with them
            with same_error(peers, RestoreError, "state 'rows'"):
                ours.restore()
            return
        report = ours.restore()
    assert report.from_memory
    holds(states, boxes, peers.size, peers.size)


def lose_tiles_of_last(peers, memory):
    """Let nobody hold the tiles of the last rank."""
    gone = peers.size - 1
    memory.shares = {
        name: tuple([one for one in shares if one.rank != gone])
        for name, shares in memory.shares.items()
    }


def test_a_copy_that_lacks_tiles_gives_way_to_the_newest_generation(
    peers, shared_path, caplog
):
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    states, memory = states_of(boxes, rank=peers.rank), Memory()
    with managed(shared_path, states, peers, memory) as ours:
        ours.save(step=1)
        ours.remember(step=2)
        lose_tiles_of_last(peers, memory)
        spoil(states)
        with caplog.at_level(logging.WARNING):
            report = ours.restore()
        assert memory.copy is None
    assert not report.from_memory
    assert report.step == 1
    assert ("state 'field', leaf 'x'" in caplog.text) == (peers.rank == 0)
    holds(states, boxes, peers.size, peers.size)


def test_a_lost_copy_is_not_taken_for_a_first_start(peers, shared_path):
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    states, memory = states_of(boxes, rank=peers.rank), Memory()
    with managed(shared_path, states, peers, memory) as ours:
        ours.remember(step=2)
        lose_tiles_of_last(peers, memory)
        with same_error(peers, RestoreError, "state 'field'", "nothing was changed"):
            ours.restore()
        assert ours.restore() is None


@pytest.mark.parametrize("where", ["tiles", "whole"])
def test_a_copy_that_fails_on_a_rank_leaves_all_or_none(
    peers, shared_path, monkeypatch, where
):
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    states, memory = states_of(boxes, rank=peers.rank), Memory()

    def broken(*_, **__):
        raise MemoryError("no memory for it")

    last = peers.size - 1
    with managed(shared_path, states, peers, memory) as ours:
        ours.save(step=1)
        with monkeypatch.context() as patch:
            if peers.rank == last:
                module, name = {
                    "tiles": (copies, "_pack"),
                    "whole": (copies, "stage"),
                }[where]
                patch.setattr(module, name, broken)
            with same_error(peers, StageError, f"rank {last}", "no memory"):
                ours.remember(step=2)
        spoil(states)
        report = ours.restore()
        # Where tiles fail, the copy of before is whole on each rank.
        assert report.step == (1 if where == "tiles" else 2)
        assert report.from_memory
        holds(states, boxes, peers.size, peers.size)
        ours.remember(step=3)
        assert [len(memory.shares), memory.copy.step] == [1, 3]


def test_a_rank_without_the_new_copy_has_its_tiles(peers, shared_path):
    """As if a rank were lost when some had learned that all have the tiles, others not."""
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    states, memory = states_of(boxes, rank=peers.rank), Memory()
    with managed(shared_path, states, peers, memory) as ours:
        ours.remember(step=1)
        old, before = memory.copy, dict(memory.shares)
        for block in states["field"].blocks["x"]:
            block.array[...] += 1
        ours.remember(step=2)
        if peers.rank:
            memory.copy, memory.shares = old, {**before, **memory.shares}
        spoil(states)
        report = ours.restore()
        assert (report.step, report.from_memory) == (2, True)
    for block, (offset, shape) in zip(states["field"].blocks["x"], boxes, strict=True):
        want = WHOLE[cuts.box_slices(offset, shape)] + 1
        assert block.array.tobytes() == want.tobytes()


def test_ages_put_a_later_copy_of_a_step_first(peers, shared_path):
    states, memory = (
        {
            "x": ShardedArrayState(
                "x",
                {"x": cuts.blocks(WHOLE, cuts.rows(WHOLE.shape, peers.size)[peers.rank])},
            )
        },
        Memory(),
    )
    ages = [memory.age]
    with managed(shared_path, states, peers, memory) as ours:
        for step in (0, 0, 1):
            ours.remember(step=step)
            ages.append(memory.age)
    assert all(one < other for one, other in pairwise(ages))


def test_what_was_whole_is_cut_from_a_copy(peers, shared_path):
    memory = Memory()
    whole = {
        "x": ArrayState("x", {"x": WHOLE.copy()}),
        "rows": ConcatState("rows", {"i": np.arange(3)}),
    }
    with managed(shared_path, whole, peers, memory) as ours:
        ours.remember(step=1)
    boxes = cuts.columns(WHOLE.shape, peers.size)[peers.rank]
    mine = cuts.blocks(WHOLE, boxes, filled=False)
    cut = {"x": ShardedArrayState("x", {"x": mine}), "rows": whole["rows"]}
    with managed(shared_path, cut, peers, memory) as ours:
        assert ours.restore().from_memory
    for block, (offset, shape) in zip(mine, boxes, strict=True):
        assert block.array.tobytes() == WHOLE[cuts.box_slices(offset, shape)].tobytes()


def test_tiles_go_to_another_host(peers, on_hosts, shared_path):
    """Ranks 0 and 1 are on one host, the others on another."""
    on_hosts("aabb" if peers.size > 2 else "ab")
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    memory = Memory()
    with managed(shared_path, states_of(boxes, rank=peers.rank), peers, memory) as ours:
        ours.remember(step=1)
    (shares,) = memory.shares.values()
    held = peers.allgather([one.rank for one in shares])
    assert [ranks[0] for ranks in held] == list(range(peers.size))
    expected = {2: [1, 0], 3: [1, 2, 0], 4: [3, 2, 0, 1]}
    assert [ranks[1] for ranks in held] == expected[peers.size]
    with manager(shared_path, ArrayState("other", {"x": np.zeros(1)}), comm=peers) as ours:
        assert ours.restore() is None
