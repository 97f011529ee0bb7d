# SPDX-License-Identifier: Apache-2.0
"""The parts of ranks as leaves of a generation: what tools see, and what is read again."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mpi_ckpt
from mpi_ckpt import Options, PerRankState, RNGState
from mpi_ckpt.engine.restore.cut.dealing import LazyParts, SavedParts
from mpi_ckpt.errors import CorruptGenerationError, StateMismatchError
from mpi_ckpt.leaves.leaf import Leaf, LeafSpec, MemoryBuffer
from mpi_ckpt.state import Capture
from mpi_ckpt.states.packed import pack, unpack
from mpi_ckpt.storage.format.layout import (
    find_parts,
    part_leaf_name,
    structure_name,
)
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.commands import ask
from tests.cutting import CutArray, write_cut
from tests.making import joined, publish
from tests.restore.make_golden import GOLDEN
from tests.values import alike

VALUES = [
    {"position": 7, "cache": np.arange(6.0).reshape(2, 3), "seen": (1, 2.5, "x")},
    np.arange(4, dtype=np.int16),
    {"": torch.ones(2, dtype=torch.bfloat16), "a/b": b"x" * 5000, "a": {"b": np.zeros(0)}},
    None,
]


@pytest.fixture
def saved(tmp_path):
    publish(tmp_path, [joined(PerRankState("own"), VALUES)])
    return tmp_path


def test_arrays_of_a_part_are_leaves_of_their_own_type_and_shape(saved):
    with mpi_ckpt.load(saved) as generation:
        own = generation["own"]
        forms = {name: (own.lazy(name).dtype, tuple(own.lazy(name).shape)) for name in own}
        assert forms.pop("rank-00000.json")[0] == "U8"
        for rank in (1, 2, 3):
            assert forms.pop(structure_name(rank))[0] == "U8"
        assert forms == {
            "rank-00000/cache": ("F64", (2, 3)),
            "rank-00001": ("I16", (4,)),
            "rank-00002": ("BF16", (2,)),
            "rank-00002/a/b": ("U8", (5000,)),
            "rank-00002/a/b#2": ("F64", (0,)),
        }
        assert (own["rank-00000/cache"] == VALUES[0]["cache"]).all()
        assert alike(own["rank-00002"], VALUES[2][""])
        assert own.lazy("rank-00000/cache")[1].tolist() == [3.0, 4.0, 5.0]
        assert json.loads(own["rank-00003.json"].tobytes()) is None


def test_value_of_a_loaded_state_is_the_list_of_the_ranks_values(saved):
    with mpi_ckpt.load(saved) as generation:
        values = generation["own"].value()
    assert len(values) == len(VALUES)
    assert all(alike(mine, other) for mine, other in zip(values, VALUES, strict=True))


def test_commands_see_the_leaves_of_a_part(saved):
    (state,) = ask("show", saved, "--all", "--json")["states"]
    forms = {leaf["name"]: (leaf["dtype"], leaf["shape"]) for leaf in state["leaves"]}
    assert forms["rank-00000/cache"] == ("F64", [2, 3])
    changed = [{**VALUES[0], "cache": np.ones((2, 3))}, *VALUES[1:]]
    publish(saved, [joined(PerRankState("own"), changed)])
    found = json.dumps(ask("diff", saved, "1", "2", "--json", code=1))
    assert "rank-00000/cache" in found
    assert "rank-00002" not in found
    ask("export", saved, "--to", saved / "all.pt", "--json")
    exported = torch.load(saved / "all.pt", weights_only=False)
    assert "cache" in exported["own"][0]


def test_streams_are_leaves_too(tmp_path):
    state = RNGState(generators={"mine": np.random.RandomState(3)})
    publish(tmp_path, [state])
    with mpi_ckpt.load(tmp_path) as generation:
        leaves = generation["rng"]
        python = leaves["rank-00000/streams/python/1"]
        assert python.dtype == np.uint32
        assert tuple(python.tolist()) == random.getstate()[1]
        (value,) = leaves.value()
        key = state._streams()["generator/mine"].get()
        assert alike(value["streams"]["generator/mine"], key)


def first_form(name, structure, parts):
    """Return a state whose parts are saved as releases before the leaves saved them."""
    leaves = [
        Leaf(LeafSpec(f"rank-{rank:05d}", "U8", (len(part),)), MemoryBuffer(part))
        for rank, part in enumerate(parts)
    ]
    state = PerRankState(name)
    state.capture = lambda: Capture(structure, leaves)
    return state


def test_parts_of_an_earlier_release_are_restored(tmp_path):
    golden = tmp_path / "parts"
    shutil.copytree(GOLDEN / "parts", golden)
    with mpi_ckpt.load(golden) as generation:
        values = generation["own"].value()
        saved = generation["rng"].value()
    assert values[0]["position"] == 7
    assert (values[0]["cache"] == np.arange(6.0).reshape(2, 3)).all()
    assert alike(values[1:], [[np.arange(4, dtype=np.int16), "text", b"bytes" * 100], None])
    generator = np.random.RandomState(99)
    again = PerRankState("own"), RNGState(generators={"mine": generator})
    assert restored(golden, *again).saved_size == 1
    assert alike(again[0].value, values[0])
    assert generator.random_sample() == np.random.RandomState(3).random_sample()
    assert len(saved) == 3
    assert random.getstate()[1][0] == saved[0]["streams"]["python"][1][0]


def restored(path, *states):
    with mpi_ckpt.CheckpointManager(
        path, list(states), options=Options(preemption_signals=())
    ) as manager:
        return manager.restore()


def test_values_of_the_first_form_are_restored(tmp_path):
    parts = [pack(value) for value in VALUES]
    publish(tmp_path, [first_form("own", {"values": len(parts)}, parts)])
    state = PerRankState("own", resize=lambda values, _: [values[2]])
    assert restored(tmp_path, state).saved_size == 1
    assert alike(state.value, VALUES[2])
    with mpi_ckpt.load(tmp_path) as generation:
        assert set(generation["own"].value()) == {"structure", "leaves"}


def test_streams_of_the_first_form_are_restored(tmp_path):
    own = np.random.default_rng(1)
    state = RNGState(generators={"mine": own})
    streams = {key: pack(stream.get()) for key, stream in state._streams().items()}
    head = json.dumps({"kinds": state._kinds_now(), "shared": {}}).encode()
    part = head + b"\n" + pack(streams)
    structure = {"size": 1, "kinds": state._kinds_now(), "shared": []}
    publish(tmp_path, [first_form("rng", structure, [part])])
    expected = random.random(), own.random()
    restored(tmp_path, state)
    assert (random.random(), own.random()) == expected


def test_root_reads_parts_by_the_window_and_never_holds_them_all(tmp_path):
    count, nbytes = 16, 1 << 20
    # Of two types: in the file, which has larger elements first, they are not in a row.
    values = [
        {"a": np.full(nbytes // 16, float(n)), "b": np.full(nbytes // 2, n, np.int8)}
        for n in range(count)
    ]
    publish(tmp_path, [joined(PerRankState("own"), values)])
    with GenerationReader(tmp_path / "checkpoint-00000001") as reader:
        parts = SavedParts(reader, "own", 2 * nbytes)
        tracemalloc.start()
        try:
            for rank, part in parts.read(range(count)):
                assert len(part) > parts.nbytes(rank) == nbytes
                assert (unpack(part)["a"] == rank).all()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert 2 * nbytes < peak < 8 * nbytes


def share_out(values, size):
    """Give each rank the sum of every so manieth value."""
    for rank in range(size):
        yield sum(values[saved] for saved in range(rank, len(values), size))


@pytest.mark.parametrize("is_generator", [True, False])
def test_resize_that_yields_holds_few_values_on_root(tmp_path, is_generator):
    count, size, nbytes = 16, 3, 1 << 20
    values = [np.full(nbytes // 8, float(n)) for n in range(count)]
    publish(tmp_path, [joined(PerRankState("own"), values)])
    function = share_out if is_generator else lambda *given: list(share_out(*given))
    state = PerRankState("own", resize=function)
    with GenerationReader(tmp_path / "checkpoint-00000001") as reader:
        parts = LazyParts(SavedParts(reader, "own", nbytes))
        assert (unpack(parts[-1]) == count - 1).all()
        assert [int(unpack(part)[0]) for part in parts[2:4]] == [2, 3]
        tracemalloc.start()
        try:
            for rank, part in enumerate(state.resize(parts, size)):
                assert (unpack(part) == sum(range(rank, count, size))).all()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    if is_generator:
        assert peak < 10 * nbytes
    else:  # all values, since the function takes a list
        assert count * nbytes < peak < (count + 10) * nbytes


def test_leaf_of_a_part_may_be_cut_into_several_tiles(tmp_path):
    """No save cuts one, but the format allows it."""
    array = np.arange(12.0).reshape(6, 2)
    text = json.dumps({"~": "array", "leaf": ""}).encode()
    arrays = {
        "rank-00000.json": CutArray.by_rows(np.frombuffer(text, np.uint8), [len(text), 0]),
        "rank-00000": CutArray.by_rows(array, [2, 4]),
    }
    with GenerationReader(write_cut(tmp_path, arrays, state="own")) as reader:
        parts = SavedParts(reader, "own", 1 << 20)
        ((rank, part),) = parts.read([0])
    assert rank == 0
    assert alike(unpack(part), array)


def test_a_release_that_knows_only_the_first_form_does_not_take_the_parts_for_its_own():
    state = joined(PerRankState("own"), [1, 2])
    captured = state.capture()
    assert len(captured.leaves) == 2  # as many as ranks: their number tells nothing
    assert state.first_key not in captured.structure


def test_structure_that_is_no_json_is_damage(tmp_path):
    leaf = Leaf(LeafSpec("rank-00000.json", "U8", (3,)), MemoryBuffer(b"nan"))
    state = PerRankState("own")
    state.capture = lambda: Capture(state.form(1), [leaf])
    path = publish(tmp_path, [state])
    with GenerationReader(path) as reader:
        parts = SavedParts(reader, "own", 1 << 20)
        with pytest.raises(CorruptGenerationError, match="structure of a part"):
            list(parts.read([0]))
    with mpi_ckpt.load(tmp_path) as generation, pytest.raises(CorruptGenerationError):
        generation["own"].value()


@pytest.mark.parametrize(
    "names",
    [
        ["rank-00000.json", "rank-00002.json"],
        ["rank-00000/x"],
        ["rank-00000.json", "rank-00001/x"],
        ["rank-00000.json", "other"],
        ["rank-00000.json", "rank-000001.json"],
        ["rank-00000.json", "rank-00000/"],
        ["rank-00001", "rank-00000"],
        ["rank-00000", "rank-00001", "rank-00001/x"],
    ],
)
def test_leaves_that_are_no_parts_are_a_mismatch(names):
    assert find_parts(names) == []
    specs = [LeafSpec(name, "U8", (1,)) for name in names]
    state = PerRankState("own")
    with pytest.raises(StateMismatchError, match="no values of ranks"):
        state.prepare(state.form(len(names)), specs, strict=True)


@given(st.lists(st.lists(st.text(max_size=6), unique=True, max_size=4), max_size=5))
def test_names_of_leaves_are_found_again(parts):
    names = [
        name
        for rank, own in enumerate(parts)
        for name in (structure_name(rank), *(part_leaf_name(rank, n) for n in own))
    ]
    assert len(set(names)) == len(names)
    found = find_parts(names)
    assert [list(part.names) for part in found] == parts
    for rank, part in enumerate(found):
        assert names[part.structure] == structure_name(rank)
        assert [names[n] for n in part.numbers] == [
            part_leaf_name(rank, name) for name in part.names
        ]
