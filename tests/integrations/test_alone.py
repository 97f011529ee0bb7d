# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from mpi_ckpt import ObjectState
from mpi_ckpt.errors import CorruptGenerationError, NoCheckpointError, SaveError, StageError
from mpi_ckpt.integrations.lightning.single_state import (
    load_alone,
    remove_alone,
    save_alone,
)

BLOCK = 16 << 20


def value():
    return {"big": np.arange(BLOCK // 8 + 3), "none": np.empty(0), "text": ("a", 1.5)}


def assert_loaded(path, expected):
    state = ObjectState("one")
    load_alone(path, state)
    assert state.value["text"] == expected["text"]
    assert np.array_equal(state.value["big"], expected["big"])
    assert state.value["none"].shape == (0,)


def test_round_trip_over_several_blocks(tmp_path):
    save_alone(tmp_path / "a.ckpt", ObjectState("one", value()), step=7)
    assert_loaded(tmp_path / "a.ckpt", value())


def test_saved_again_only_the_newer_is_left(tmp_path):
    save_alone(tmp_path, ObjectState("one", {"old": 1}), step=1)
    save_alone(tmp_path, ObjectState("one", value()), step=2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000002"]
    assert_loaded(tmp_path, value())


def test_failed_save_leaves_the_older(tmp_path):
    save_alone(tmp_path, ObjectState("one", value()), step=1)
    with pytest.raises(StageError, match=r"of type builtins\.object"):
        save_alone(tmp_path, ObjectState("one", object()), step=2)
    assert_loaded(tmp_path, value())


def test_damage_is_found(tmp_path):
    save_alone(tmp_path, ObjectState("one", value()), step=1)
    (shard,) = tmp_path.glob("checkpoint-*/*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptGenerationError, match=r"nothing in .* is good"):
        load_alone(tmp_path, ObjectState("one"))


def test_nothing_there_is_told(tmp_path):
    with pytest.raises(NoCheckpointError, match="holds no generation"):
        load_alone(tmp_path, ObjectState("one"))


def test_generation_of_other_states_is_told(tmp_path):
    save_alone(tmp_path, ObjectState("other", 1), step=1)
    with pytest.raises(NoCheckpointError, match=r"holds \['other'\], not one 'one'"):
        load_alone(tmp_path, ObjectState("one"))


def test_removed_it_is_gone(tmp_path):
    path = tmp_path / "a.ckpt"
    save_alone(path, ObjectState("one", value()), step=1)
    (path / ".lease-dead").touch()  # left where there is no flock
    remove_alone(path)
    assert not path.exists()
    remove_alone(path)


def test_what_is_not_ours_is_not_removed(tmp_path):
    save_alone(tmp_path, ObjectState("one", 1), step=1)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SaveError, match=r"it holds \['thesis.tex'\]"):
        remove_alone(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    load_alone(tmp_path, ObjectState("one"))
