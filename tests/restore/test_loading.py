# SPDX-License-Identifier: Apache-2.0
"""`mpi_ckpt.load`: what a notebook sees of a generation, and what it is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest

import mpi_ckpt
from mpi_ckpt import (
    ArrayState,
    ModuleState,
    ObjectState,
    OptimizerState,
    PerRankState,
    RNGState,
    SchedulerState,
    TrainState,
    loading,
)
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import (
    CorruptGenerationError,
    NoCheckpointError,
    NotSavedError,
    OptionsError,
    ReadError,
    RestoreError,
    UnsupportedFormatError,
)
from mpi_ckpt.storage.format import layout
from mpi_ckpt.storage.owning.lock import DirectoryLock
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.cutting import CutArray, write_cut
from tests.making import Ranks, publish, some_states

SHARD = "rank-00000.safetensors"


@pytest.fixture
def root(tmp_path):
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.3)):
        publish(tmp_path, some_states(), step=step, metrics={"loss": loss})
    return tmp_path


def names_below(root) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def flip(path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_states_and_leaves_come_by_name(root):
    with mpi_ckpt.load(root) as saved:
        assert (saved.generation, saved.step, saved.size) == (3, 30, 1)
        assert saved.metrics == {"loss": 0.3}
        assert saved.path == root / "checkpoint-00000003"
        assert list(saved) == ["arrays", "a/b", "stream", "nothing"]
        arrays = saved["arrays"]
        assert list(arrays) == ["wide", "narrow", "none", "one"]
        np.testing.assert_array_equal(arrays["wide"], np.arange(6.0).reshape(2, 3))
        assert arrays["narrow"].dtype == np.int8
        assert arrays["none"].shape == (0, 4)
        assert arrays["one"].shape == ()
        assert arrays["one"] == 7
        arrays["wide"][:] = -1  # memory of its own
        assert arrays["wide"][1, 2] == 5
        value = saved["a/b"].value()
        assert (value["epoch"], value["rate"]) == (3, 0.1)
        np.testing.assert_array_equal(value["seen"], np.arange(3))
        assert saved["stream"].value() == bytes(range(100))
        assert bytes(saved["stream"]["stream"]) == bytes(range(100))
        assert saved["nothing"].value() == b""
        assert set(arrays.value()) == set(arrays)
        saved.verify()


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ({}, 3),
        ({"generation": "newest"}, 3),
        ({"generation": 2}, 2),
        ({"step": 10}, 1),
        ({"best": "loss", "mode": "min"}, 2),
        ({"best": "loss", "mode": "max"}, 1),
    ],
)
def test_a_generation_is_chosen_as_in_a_restore(root, asked, number):
    with mpi_ckpt.load(str(root), **asked) as saved:
        assert saved.generation == number


def test_a_generation_can_be_given_by_its_own_directory(root):
    shutil.copytree(root / "checkpoint-00000002", root.parent / "copy")
    try:
        for path in (root / "checkpoint-00000002", root.parent / "copy"):
            with mpi_ckpt.load(path) as saved:
                assert saved.generation == 2
                assert saved["arrays"]["one"] == 7
        flip(root / "checkpoint-00000002" / SHARD)
        with (
            mpi_ckpt.load(root / "checkpoint-00000002") as saved,
            pytest.raises(CorruptGenerationError, match=r"there are: 1 \(step 10.* 3 \("),
        ):
            saved.verify()
    finally:
        shutil.rmtree(root.parent / "copy")


def test_nothing_is_read_before_it_is_asked_for(root, monkeypatch):
    read = []
    real = GenerationReader.read_block
    monkeypatch.setattr(
        GenerationReader,
        "read_block",
        lambda self, leaf, block: read.append(leaf.spec.name) or real(self, leaf, block),
    )
    with mpi_ckpt.load(root) as saved:
        state = saved["arrays"]
        assert "wide" in state
        assert "other" not in state
        assert state == saved["arrays"]
        assert state != saved["a/b"]
        assert len({state, saved["a/b"]}) == 2
        assert "wide F64[2, 3]" in repr(state)
        assert "generation 3" in repr(saved)
        assert read == []
        _ = state["narrow"]
        assert read == ["narrow"]


def test_no_lock_is_taken_and_nothing_is_written(root):
    lock = DirectoryLock(root, "abc", patience_seconds=0)
    before = names_below(root)
    try:
        with mpi_ckpt.load(root) as saved:
            assert saved["arrays"]["one"] == 7
    finally:
        lock.close()
    assert names_below(root) == before
    (root / ".lock").unlink()
    mpi_ckpt.load(root).close()
    assert not (root / ".lock").exists()


def test_what_is_open_can_be_read_while_a_job_prunes_it(root):
    with mpi_ckpt.load(root) as saved:
        partial = root / layout.partial_name(3, "abc")
        os.rename(saved.path, partial)
        shutil.rmtree(partial)
        assert saved["arrays"]["one"] == 7
        assert saved["stream"].value() == bytes(range(100))
        saved._source._reader.close()  # as if it had more files than can be open
        with pytest.raises(ReadError, match="was pruned, or set aside, since"):
            _ = saved["arrays"]["one"]


def test_names_that_are_not_there_are_told_with_those_that_are(root):
    with mpi_ckpt.load(root) as saved:
        with pytest.raises(NotSavedError, match="3 has no state 'arraiz'") as error:
            _ = saved["arraiz"]
        assert "did you mean 'arrays'?" in str(error.value)
        with pytest.raises(NotSavedError, match="there: 'wide', 'narrow', 'none', 'one'"):
            _ = saved["arrays"]["weight"]
        assert isinstance(error.value, KeyError)
        assert saved.get("arraiz") is None
        assert saved["arrays"].get("weight") is None


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        ({"generation": 9}, NoCheckpointError, "there are: 1 .step 10, loss=0.5."),
        ({"step": 9}, NoCheckpointError, "no generation of step 9"),
        ({"best": "accuracy", "mode": "max"}, NoCheckpointError, "metric 'accuracy'"),
        ({"best": "loss"}, OptionsError, "give mode='min' or mode='max'"),
        ({"generation": 1, "step": 10}, OptionsError, "give only one of these"),
        ({"generation": "3"}, OptionsError, "must be integers"),
    ],
)
def test_what_is_not_there_or_makes_no_sense_is_told(root, asked, error, told):
    with pytest.raises(error, match=told):
        mpi_ckpt.load(root, **asked)


def test_directories_without_a_good_generation_are_told_apart(root, tmp_path):
    with pytest.raises(NoCheckpointError, match="holds no generation"):
        mpi_ckpt.load(tmp_path / "missing")
    (tmp_path / "old" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(UnsupportedFormatError, match="adaptdl"):
        mpi_ckpt.load(tmp_path / "old")
    for number in (1, 2, 3):
        (root / f"checkpoint-{number:08d}" / "manifest.json").write_bytes(b"rubbish")
    with pytest.raises(CorruptGenerationError, match=r"no generation in .* is good"):
        mpi_ckpt.load(root)


def test_damage_is_told_when_it_is_met_and_never_handed_out(root):
    flip(root / "checkpoint-00000003" / SHARD)
    with mpi_ckpt.load(root) as saved:
        assert saved["stream"].value() == bytes(range(100))
        with pytest.raises(CorruptGenerationError, match="What was read before") as caught:
            _ = [state.value() for state in saved.values()]
        assert "leaf '" in str(caught.value)
        assert "ask for another; there are: 1 (step 10" in str(caught.value)
        with pytest.raises(CorruptGenerationError):
            saved.verify()
    assert (root / "checkpoint-00000003").is_dir()


def test_a_damaged_newest_gives_way_with_a_warning_and_one_asked_for_does_not(root, caplog):
    (root / "checkpoint-00000003" / SHARD).unlink()
    with mpi_ckpt.load(root) as saved:
        assert saved.generation == 2
    assert "generation 3 is not used" in caplog.text
    with pytest.raises(CorruptGenerationError, match="generation 3 was requested"):
        mpi_ckpt.load(root, 3)


def test_a_closed_one_says_so(root):
    saved = mpi_ckpt.load(root)
    array = saved["arrays"]["one"]
    saved.close()
    saved.close()
    assert array == 7
    with pytest.raises(RestoreError, match="is closed; read what you need before"):
        _ = saved["arrays"]["one"]


def test_one_that_is_not_closed_leaves_no_file_open(root):
    for _ in range(3):
        assert mpi_ckpt.load(root)["arrays"]["one"] == 7  # the test's fixture looks


def tied_model():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["norm"] = torch.nn.BatchNorm1d(3)
    return torch, model.to(torch.bfloat16)


def train(torch, model):
    optimizer = torch.optim.Adam(model.parameters())
    model["b"](model["a"](torch.ones(2, 3, dtype=torch.bfloat16))).sum().backward()
    optimizer.step()
    return optimizer


def test_torch_states_give_tensors_and_what_load_state_dict_takes(tmp_path):
    torch, model = tied_model()
    optimizer = train(torch, model)
    states = [
        ModuleState("model", model),
        OptimizerState("optimizer", optimizer),
        ObjectState("object", {"t": torch.arange(3), "a": np.arange(3), "x": (1, {2})}),
        ArrayState("arrays", {"a": np.arange(3)}),
    ]
    publish(tmp_path, states)
    with mpi_ckpt.load(tmp_path) as saved:
        weight = saved["model"]["a.weight"]
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(weight, model["a"].weight)
        state_dict = saved["model"].value()
        _, other = tied_model()
        other.load_state_dict(state_dict)
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)
        value = saved["object"].value()
        assert torch.equal(value["t"], torch.arange(3))
        assert isinstance(value["a"], np.ndarray)
        assert value["x"] == (1, {2})
        assert isinstance(saved["arrays"]["a"], np.ndarray)
        moments = [saved["optimizer"][name] for name in saved["optimizer"]]
        assert all(isinstance(moment, torch.Tensor) for moment in moments)


def test_the_parts_of_a_training_come_by_their_names(tmp_path):
    torch, model = tied_model()
    optimizer = train(torch, model)
    publish(tmp_path, [TrainState(module=model, optimizer=optimizer)])
    with mpi_ckpt.load(tmp_path) as saved:
        assert isinstance(saved["train"]["module/a.weight"], torch.Tensor)
        value = saved["train"].value()
        assert isinstance(value["module"], OrderedDict)
        _, other = tied_model()
        other.load_state_dict(value["module"])
        assert torch.equal(other["b"].weight, model["a"].weight)
        optimizer = torch.optim.Adam(other.parameters())
        optimizer.load_state_dict(value["optimizer"])
        assert optimizer.state_dict()["state"][0]["step"] == 1


def test_without_torch_its_tensors_come_as_arrays(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    publish(tmp_path, [ModuleState("model", torch.nn.Linear(3, 2))])
    monkeypatch.setattr(loading, "_has_torch", lambda: False)
    with mpi_ckpt.load(tmp_path) as saved:
        assert isinstance(saved["model"]["weight"], np.ndarray)
        assert saved["model"].value()["weight"].shape == (2, 3)


def cut_root(tmp_path):
    """Write a generation of arrays that three ranks hold in parts, and one of all ranks."""
    halves = [[Box((0, 0), (6, 4))], [Box((0, 4), (6, 3))], [Box((0, 7), (6, 3))]]
    arrays = {
        "rho": CutArray(np.arange(60.0).reshape(6, 10), halves),
        "ids": CutArray.by_rows(np.arange(7), [3, 0, 4]),
        "one": CutArray(np.array(7, np.int16), [[], [Box((), ())], []]),
        "none": CutArray.by_rows(np.empty((0, 3), np.float32), [0, 0, 0]),
    }
    whole = {"time": np.array([0.5, 1.5])}
    write_cut(tmp_path / "cut", arrays, whole=whole, block_bytes=64)
    return tmp_path / "cut", {name: one.array for name, one in arrays.items()} | whole


def test_arrays_that_were_cut_come_back_whole(tmp_path):
    root, arrays = cut_root(tmp_path)
    with mpi_ckpt.load(root) as saved:
        state = saved["fields"]
        assert list(state) == ["time", "rho", "ids", "one", "none"]
        assert "rho F64[6, 10]" in repr(state)
        for name, array in arrays.items():
            np.testing.assert_array_equal(state[name], array, strict=True)
        value = state.value()
        assert set(value) == set(arrays)
        saved.verify()


@pytest.mark.parametrize(
    "index",
    [
        ..., (), 2, -1, np.int64(3), (2, 3), (..., 9), (0, ...), slice(2, 5),
        (slice(1, 6, 2), slice(None, None, 3)), (5, slice(-3, 99)),
        (slice(None), 3), (slice(4, 2), slice(5)),
    ],
    ids=repr,
)  # fmt: skip
def test_a_part_of_a_leaf_is_what_numpy_would_give(tmp_path, index):
    root, arrays = cut_root(tmp_path)
    with mpi_ckpt.load(root) as saved:
        lazy = saved["fields"].lazy("rho")
        assert (lazy.name, lazy.dtype, lazy.shape) == ("rho", "F64", (6, 10))
        assert repr(lazy) == "<leaf rho F64[6, 10] of state 'fields'>"
        np.testing.assert_array_equal(lazy[index], arrays["rho"][index], strict=True)


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        (6, "6 is out of range for a dimension of 6"),
        ((0, -11), "-11 is out of range"),
        ((0, 0, 0), "too many indices"),
        ((..., ...), "too many indices"),
        (slice(None, None, -1), "negative step"),
        ([0, 1], "use integers and slices"),
        (None, "use integers and slices"),
        (True, "use integers and slices"),
        (1.0, "use integers and slices"),
    ],
)
def test_other_indices_are_refused(tmp_path, index, fault):
    root, _ = cut_root(tmp_path)
    with (
        mpi_ckpt.load(root) as saved,
        pytest.raises(IndexError, match=re.escape(fault)),
    ):
        _ = saved["fields"].lazy("rho")[index]


def test_parts_of_whole_leaves_scalars_and_streams_are_read_too(root, tmp_path):
    with mpi_ckpt.load(root) as saved:
        assert saved["arrays"].lazy("wide")[1, 1:].tolist() == [4, 5]
        assert saved["stream"].lazy("stream")[2:5].tobytes() == bytes([2, 3, 4])
        assert saved["a/b"].lazy("seen")[...].tolist() == [0, 1, 2]
        with pytest.raises(NotSavedError, match="no leaf 'wild'"):
            saved["arrays"].lazy("wild")
    cut, _ = cut_root(tmp_path)
    with mpi_ckpt.load(cut) as saved:
        assert saved["fields"].lazy("one")[()] == 7
        assert saved["fields"].lazy("none")[:, 1].shape == (0,)


def test_parts_of_tensors_are_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    weight = torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4).t()
    publish(tmp_path, [ObjectState("object", {"w": torch.nn.Parameter(weight)})])
    with mpi_ckpt.load(tmp_path) as saved:
        (name,) = saved["object"]
        part = saved["object"].lazy(name)[1:3, 2]
        assert isinstance(part, torch.Tensor)
        assert torch.equal(part, weight[1:3, 2])


def test_a_part_reads_only_the_blocks_that_hold_it(tmp_path, monkeypatch):
    root, arrays = cut_root(tmp_path)
    read = []
    real = GenerationReader.read_block
    monkeypatch.setattr(
        GenerationReader,
        "read_block",
        lambda self, leaf, n: read.append((leaf.spec.name, n)) or real(self, leaf, n),
    )
    with mpi_ckpt.load(root) as saved:
        lazy = saved["fields"].lazy("rho")
        assert read == []
        assert lazy[0:2, 0:2].tolist() == arrays["rho"][0:2, 0:2].tolist()
        assert read == [("fields/rho@0,0", 0)]  # 8 elements a block, 4 a row
        read.clear()
        flip(root / "checkpoint-00000001" / "tiles-00001.safetensors", -10)
        assert lazy[:, 8].tolist() == arrays["rho"][:, 8].tolist()
        assert {name for name, _ in read} == {"fields/rho@0,7"}
        with pytest.raises(CorruptGenerationError, match=r"leaf 'rho': .*tiles-00001"):
            _ = saved["fields"]["rho"]


ALONE = """
import json, sys
sys.modules["mpi4py"] = None  # an import would fail
import mpi_ckpt
saved = mpi_ckpt.load(sys.argv[1])
first = saved["arrays"]["wide"].tolist()
value = saved["a/b"].value()["epoch"]
print(json.dumps([first, value, "torch" in sys.modules,
    sorted(n for n in sys.modules if n.startswith(("mpi_ckpt.comm", "mpi_ckpt.engine")))]))
"""


def test_a_notebook_needs_no_mpi_and_no_torch(root):
    command = [sys.executable, "-c", ALONE, str(root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [[[0, 1, 2], [3, 4, 5]], 3, False, []]


READER = """
import sys
import mpi_ckpt
seen = set()
while len(seen) < 15:
    with mpi_ckpt.load(sys.argv[1]) as saved:
        seen.add(saved.generation)
        assert int(saved["arrays"]["one"]) == 7
        assert saved["a/b"].value()["epoch"] == 3
print(max(seen))
"""


def test_a_reader_never_fails_while_a_job_saves_and_prunes(tmp_path):
    publish(tmp_path, some_states())
    command = [sys.executable, "-c", READER, str(tmp_path)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while reader.poll() is None:
            newest = publish(tmp_path, some_states())
            for path in tmp_path.glob("checkpoint-*"):
                if path != newest:
                    gone = tmp_path / layout.partial_name(int(path.name[-8:]), "abc")
                    path.rename(gone)
                    shutil.rmtree(gone)
        out, err = reader.communicate(timeout=60)
    finally:
        reader.kill()
    assert reader.returncode == 0, err.decode()
    assert int(out) >= 15


def test_every_kind_of_state_has_a_value(tmp_path):
    torch, model = tied_model()
    optimizer = train(torch, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    per_rank = PerRankState("own", {"n": 1, "a": np.arange(2)})
    streams = RNGState()
    states = [
        TrainState(module=model, optimizer=optimizer, scheduler=scheduler),
        SchedulerState("alone", scheduler),
        per_rank,
        streams,
    ]
    for state in (per_rank, streams):
        state.bind(Ranks())
    publish(tmp_path, states)
    with mpi_ckpt.load(tmp_path) as saved:
        value = saved["train"].value()
        assert value["scheduler"]["last_epoch"] == saved["alone"].value()["last_epoch"] == 0
        assert value["optimizer"] is not None
        (own,) = saved["own"].value()  # a value for each rank
        assert own["n"] == 1
        assert own["a"].tolist() == [0, 1]
        (held,) = saved["rng"].value()
        assert {"python", "numpy"} <= set(held["streams"])
