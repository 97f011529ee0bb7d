# SPDX-License-Identifier: Apache-2.0
"""Cut state beside other state, in every kind of save."""

import random

import numpy as np
import pytest

from mpi_ckpt import (
    ArrayState,
    ConcatState,
    ObjectState,
    RNGState,
    ShardedArrayState,
)
from mpi_ckpt.options import IO
from tests.cut import cuts
from tests.cut.parallel.test_any_cut import on_first
from tests.making import Stream
from tests.ranks import manager

WHOLE = cuts.whole_array((12, 5))


def states_of(boxes, *, filled=True, rank=0):
    """Return a state of each kind, and what they hold."""
    scale = 1 if filled else 0
    blocks = cuts.blocks(WHOLE, boxes, filled=filled)
    return {
        "field": ShardedArrayState("field", {"x": blocks}),
        "rows": ConcatState("rows", {"i": np.arange(rank + 2) * scale}),
        "whole": ArrayState("whole", {"a": np.arange(7.0) * scale}),
        "value": ObjectState("value", {"epoch": 3 * scale}),
        "random": RNGState(),
        "plain": Stream("plain", b"text" * scale),
    }


def holds(states, boxes, saved, size):
    for block, (offset, shape) in zip(states["field"].blocks["x"], boxes, strict=True):
        assert block.array.tobytes() == WHOLE[cuts.box_slices(offset, shape)].tobytes()
    rows = sum(rank + 2 for rank in range(saved))
    assert len(states["rows"].arrays["i"]) in (rows // size, rows // size + 1)
    assert states["whole"].arrays["a"].tolist() == list(range(7))
    assert states["value"].value == {"epoch": 3}
    assert states["plain"].data == b"text"


SAVES = [
    {},
    {"asynchronous": True},
    {"writers": "all"},
    {"writers": "node"},
    {"writers": "all", "asynchronous": True},
    {"io": IO(reuse=False)},
    {"io": IO(mode="direct")},
]


@pytest.mark.parametrize("options", SAVES, ids=str)
def test_all_kinds_of_state_in_one_generation(peers, shared_path, options):
    there = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    states = states_of(there, rank=peers.rank)
    with manager(shared_path, *states.values(), comm=peers, **options) as ours:
        for step in (1, 2):
            ours.save(step=step)
        drawn = random.random()
    few = max(1, peers.size - 1)

    def restore(part):
        here = cuts.columns(WHOLE.shape, few)[part.rank]
        again = states_of(here, filled=False, rank=part.rank)
        with manager(shared_path, *again.values(), comm=part) as theirs:
            assert theirs.restore().step == 2
        holds(again, here, peers.size, few)
        assert few != peers.size or random.random() == drawn

    on_first(peers, few, restore)


@pytest.mark.parametrize("sync", [True, False])
def test_a_save_without_sync_has_all_tiles(peers, shared_path, sync):
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    states = states_of(boxes, rank=peers.rank)
    with manager(shared_path, *states.values(), comm=peers) as ours:
        ours.save(sync=sync)
        assert ours.restore() is not None
    holds(states, boxes, peers.size, peers.size)


def test_a_save_of_other_states_carries_tiles_over(peers, shared_path):
    boxes = cuts.rows(WHOLE.shape, peers.size)[peers.rank]
    states = states_of(boxes, rank=peers.rank)
    with manager(shared_path, *states.values(), comm=peers) as ours:
        ours.save(step=1)
        ours.save(step=2, only=["value"])
        ours.save(step=3, only=["field"])
    again = states_of(boxes, filled=False, rank=peers.rank)
    with manager(shared_path, *again.values(), comm=peers) as ours:
        assert ours.restore().step == 3
    holds(again, boxes, peers.size, peers.size)
