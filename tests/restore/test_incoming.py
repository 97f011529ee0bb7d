# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

from mpi_ckpt.engine.outline import Outline
from mpi_ckpt.engine.restore.matching import match_states
from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.leaves.target import Target
from mpi_ckpt.states.arrays import ArrayState, array_leaf
from mpi_ckpt.states.nested import ObjectState
from mpi_ckpt.states.unshared.ranked import PerRankState
from mpi_ckpt.storage.reading.reader import read_manifest
from tests.making import Stream, publish, some_states


@pytest.fixture
def outline(tmp_path):
    path = publish(tmp_path)
    made = Outline.of_generation(
        read_manifest(path), str(path), {state.name: False for state in some_states()}, {}
    )
    told = Outline.from_json(json.loads(json.dumps(made.to_json())))
    assert told.to_json() == made.to_json()
    return told


def test_place_is_found_for_every_byte(outline):
    states = some_states()
    matched = match_states(outline, states, strict=True)
    assert [pair.state for pair in matched] == states
    assert [len(pair.arrival.leaves) for pair in matched] == [4, 1, 1, 1]
    stream = matched[2].arrival.leaves[0].spec
    assert (stream.dtype, stream.nbytes) == ("U8", 100)
    for pair in matched:
        lengths = [leaf.spec.nbytes for leaf in pair.arrival.leaves]
        assert [extent.nbytes for extent in pair.saved.extents] == lengths
        assert [spec.nbytes for spec in pair.saved.specs] == lengths


def test_what_is_not_asked_for_is_told_by_name_only(tmp_path):
    manifest = read_manifest(publish(tmp_path))
    outline = Outline.of_generation(manifest, "", {"stream": False}, {"a": "bad"})
    assert [outlined.name for outlined in outline.states] == ["stream"]
    assert outline.others == ("arrays", "a/b", "nothing")
    assert outline.quarantined == {"a": "bad"}
    assert outline.title == "generation 1"


def test_parts_of_ranks_are_told_by_their_number_only(tmp_path):
    own = PerRankState("own", {"x": np.ones(3), "y": np.ones(4)})
    manifest = read_manifest(publish(tmp_path, [own, *some_states()]))
    wanted = {"own": True, "arrays": True}
    own, other = Outline.of_generation(manifest, "", wanted, {}).states
    assert (own.parts, own.specs, own.extents) == (1, (), None)
    assert (other.parts, other.specs) == (0, ())  # no parts: a mismatch


def test_mismatches_of_all_states_are_told_at_once(outline):
    states = [
        ArrayState("arrays", {"wide": np.ones(1)}),
        Stream("a/b"),
        ObjectState("stream", {}),
    ]
    with pytest.raises(StateMismatchError) as caught:
        match_states(outline, states, strict=True)
    told = str(caught.value)
    assert "arrays: wide" in told
    assert "'a/b' was saved as leaves" in told
    assert "'stream' was saved as a stream" in told
    assert len(caught.value.problems) == 6
    assert caught.value.generation == 1


def test_target_is_live_memory_where_that_is_contiguous():
    array = np.zeros(2, np.int16)
    leaf = array_leaf("x", array)
    target = Target(leaf.spec, leaf)
    target.memory()[:] = np.array([1, 2], np.int16).tobytes()
    assert array.tolist() == [1, 2]
    target.finish()
    assert array.tolist() == [1, 2]


def test_target_elsewhere_is_filled_when_all_is_there():
    array = np.zeros((2, 2), np.int16)
    leaf = array_leaf("x", array[:, 1])
    target = Target(leaf.spec, leaf)
    target.memory()[:2] = np.int16(1).tobytes()
    target.memory()[2:] = np.int16(2).tobytes()
    assert not array.any()
    target.finish()
    assert array.tolist() == [[0, 1], [0, 2]]


def test_target_that_nobody_wants_takes_its_bytes_all_the_same():
    spec = LeafSpec("x", "U8", (3,))
    target = Target(spec, None)
    target.memory()[:] = b"abc"
    target.finish()
    assert len(target.memory()) == 3
