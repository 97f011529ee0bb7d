# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

from mpi_ckpt.engine.description import describe_generation
from mpi_ckpt.engine.incoming import match
from mpi_ckpt.engine.targets import Target
from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.states.arrays import ArrayBuffer, ArrayState
from mpi_ckpt.states.objects import ObjectState
from mpi_ckpt.storage.reader import read_manifest
from tests.making import Stream, publish, some_states


@pytest.fixture
def description(tmp_path):
    return json.loads(json.dumps(describe_generation(read_manifest(publish(tmp_path)))))


def test_place_is_found_for_every_byte(description):
    states = some_states()
    incoming = match(description, states, strict=True)
    assert [one.state for one in incoming] == states
    assert [len(one.leaves) for one in incoming] == [4, 1, 1, 1]
    stream = incoming[2].leaves[0].spec
    assert (stream.dtype, stream.nbytes) == ("U8", 100)
    for one in incoming:
        assert [p.nbytes for p in one.places] == [leaf.spec.nbytes for leaf in one.leaves]


def test_mismatches_of_all_states_are_told_at_once(description):
    states = [
        ArrayState("arrays", {"wide": np.ones(1)}),
        Stream("a/b"),
        ObjectState("stream", {}),
    ]
    with pytest.raises(StateMismatchError) as caught:
        match(description, states, strict=True)
    told = str(caught.value)
    assert "arrays: wide" in told
    assert "'a/b' was saved as leaves" in told
    assert "'stream' was saved as a stream" in told
    assert len(caught.value.problems) == 6
    assert caught.value.generation == 1


def test_target_is_live_memory_where_that_is_contiguous():
    array = np.zeros(2, np.int16)
    target = Target(ArrayBuffer(array), 4)
    target.memory()[:] = np.array([1, 2], np.int16).tobytes()
    assert array.tolist() == [1, 2]
    target.finish()
    assert array.tolist() == [1, 2]


def test_target_elsewhere_is_filled_when_all_is_there():
    array = np.zeros((2, 2), np.int16)
    target = Target(ArrayBuffer(array[:, 1]), 4)
    target.memory()[:2] = np.int16(1).tobytes()
    target.memory()[2:] = np.int16(2).tobytes()
    assert not array.any()
    target.finish()
    assert array.tolist() == [[0, 1], [0, 2]]
