# SPDX-License-Identifier: Apache-2.0
"""`export` and `import`: bit for bit there and back, and no code run on the way."""

from __future__ import annotations

import json
import os
import pickle
import sys
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.states.module import ModuleState
from mpi_ckpt.states.nested import ObjectState
from mpi_ckpt.states.train import TrainState
from mpi_ckpt.states.unshared.rng import RNGState
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from mpi_ckpt.storage.owning.lock import DirectoryLock
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.commands import ask, fill, flip, run
from tests.making import Stream, publish, save, some_states


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 3).to(torch.bfloat16)
        self.two = torch.nn.Linear(3, 3).to(torch.bfloat16)
        self.two.weight = self.one.weight
        self.register_buffer("empty", torch.empty(0))
        with torch.no_grad():
            self.one.bias.copy_(torch.tensor([float("nan"), -0.0, float("inf")]))


def training(root):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.two(model.one(torch.ones(1, 3, dtype=torch.bfloat16))).sum().backward()
    optimizer.step()
    states = [TrainState(module=model, optimizer=optimizer), RNGState(), *some_states()]
    publish(root, states, step=7, size=3, metrics={"loss": float("nan"), "acc": 0.5})
    return model, optimizer


def contents(path):
    with GenerationReader(path) as reader:
        manifest = reader.manifest
        verify(reader)
    return [
        (s.name, s.structure, [(n.spec, n.digest) for n in s.leaves], s.is_stream)
        for s in manifest.states
    ]


def test_safetensors_there_and_back_is_the_same_generation(tmp_path):
    root, other, file = tmp_path / "a", tmp_path / "b", tmp_path / "x.safetensors"
    training(root)
    assert ask("export", root, "--to", file)["format"] == "safetensors"
    answer = ask("import", file, "--into", other)
    assert answer["generation"] == 1
    assert contents(root / "checkpoint-00000001") == contents(other / "checkpoint-00000001")
    assert (
        run("diff", root / "checkpoint-00000001", other / "checkpoint-00000001").exit_code
        == 0
    )
    shown = ask("show", other)
    assert (shown["step"], shown["ranks"]) == (7, 3)
    assert shown["metrics"] == {"loss": "nan", "acc": 0.5}


def test_exports_are_read_by_the_safetensors_package(tmp_path):
    root, file = tmp_path / "a", tmp_path / "m.safetensors"
    model = Model()
    publish(root, [ModuleState("model", model)])
    assert run("export", root, "--to", file, "--state", "model").exit_code == 0
    read = safetensors.torch.load_file(file)
    for name, tensor in read.items():
        live = model.state_dict()[name]
        assert tensor.dtype == live.dtype
        assert torch.equal(tensor.view(torch.uint8), live.view(torch.uint8))
    assert set(read) == set(model.state_dict()) - {"two.weight"}


def test_torch_exports_are_what_load_state_dict_takes(tmp_path):
    root, file = tmp_path / "a", tmp_path / "x.pt"
    model, optimizer = training(root)
    assert run("export", root, "--to", file).exit_code == 0
    loaded = torch.load(file, weights_only=True)
    fresh = Model()
    fresh.load_state_dict(loaded["train"]["module"])
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(
            tensor.view(torch.uint8), model.state_dict()[name].view(torch.uint8)
        )
    other = torch.optim.AdamW(fresh.parameters())
    other.load_state_dict(loaded["train"]["optimizer"])
    assert repr(other.state_dict()) == repr(optimizer.state_dict())
    assert bytes(loaded["stream"]) == bytes(range(100))
    assert bytes(loaded["nothing"]) == b""
    assert loaded["a/b"]["epoch"] == 3
    assert torch.equal(loaded["arrays"]["wide"], torch.arange(6.0).reshape(2, 3).double())


def test_a_module_there_and_back_through_torch_restores(tmp_path):
    root, file = tmp_path / "a", tmp_path / "x.pth"
    model = Model()
    publish(root, [ModuleState("model", model)])
    assert run("export", root, "--to", file, "--state", "model").exit_code == 0
    assert run("import", file, "--into", tmp_path / "b", "--state", "model").exit_code == 0
    assert contents(root / "checkpoint-00000001") == contents(
        tmp_path / "b" / "checkpoint-00000001"
    )


def test_files_of_others_become_states(tmp_path):
    root = tmp_path / "c"
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"model": torch.nn.Linear(2, 2).state_dict(), "epoch": 3}, tmp_path / "c.pt")
    answer = ask("import", tmp_path / "model.safetensors", "--into", root, "--step", "5")
    assert (answer["generation"], answer["states"]) == (1, ["model"])
    assert ask("import", tmp_path / "c.pt", "--into", root)["states"] == ["c"]
    answer = ask("import", tmp_path / "c.pt", "--into", root, "--split")
    assert (answer["generation"], answer["states"]) == (3, ["model", "epoch"])
    assert ask("show", root, "1")["step"] == 5
    shown = ask("show", root, "--structure")["states"]
    assert shown[0]["structure"] == {"ties": {}, "extra": {}}
    assert [leaf["name"] for leaf in shown[0]["leaves"]] == ["weight", "bias"]
    assert shown[1]["structure"] == 3
    assert run("verify", root, "--all").exit_code == 0


def test_a_symbolic_link_given_by_the_user_is_followed(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "blob")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert (
        run("import", tmp_path / "model.safetensors", "--into", tmp_path / "c").exit_code
        == 0
    )


class Payload:
    def __reduce__(self):
        return os.mkdir, ("/tmp/mpi-ckpt-owned",)


@pytest.mark.parametrize("damage", ["pickle", "code", "short", "empty", "noise"])
def test_hostile_files_of_torch_are_refused_in_one_line(tmp_path, damage):
    file = tmp_path / "x.pt"
    torch.save({"a": Payload() if damage == "code" else torch.ones(1000)}, file)
    if damage == "pickle":
        file.write_bytes(pickle.dumps(Payload()))
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage in ("empty", "noise"):
        file.write_bytes(b"" if damage == "empty" else os.urandom(5000))
    result = run("import", file, "--into", tmp_path / "c")
    assert result.exit_code == 1
    assert "cannot be loaded" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()
    assert not os.path.exists("/tmp/mpi-ckpt-owned")


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        header({"a": ONE}, b"abc"),
        header({"a": ONE, "b": ONE}, b"abcd"),
        header({"a": {**ONE, "shape": [5]}}, b"abcd"),
        header({"a": {**ONE, "shape": [-4]}}, b"abcd"),
        header({"a": {**ONE, "shape": [2**70]}}, b"abcd"),
        header({"a": {**ONE, "dtype": "O"}}, b"abcd"),
        header({"a": {**ONE, "data_offsets": [-4, 0]}}, b"abcd"),
        header({"a": {"dtype": "U8"}}, b"abcd"),
        header({"a": 7}),
        header(b"[" * 100_000),
        header([1]),
        header({"a": ONE}, b"abcd", length=1 << 62),
        header({"a": ONE, "__metadata__": {"mpi_ckpt": '{"states": 7}'}}, b"abcd"),
        header({"a": ONE, "__metadata__": {"mpi_ckpt": '{"states": [{}]}'}}, b"abcd"),
        header(
            {
                "a": ONE,
                "__metadata__": {
                    "mpi_ckpt": json.dumps(
                        {
                            "step": 1, "size": 1, "metrics": {},
                            "states": [{"name": "../../x", "stream": "a"}],
                        }
                    )
                },
            },
            b"abcd",
        ),
    ],
)  # fmt: skip
def test_hostile_safetensors_are_refused(tmp_path, data):
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    result = run("import", file, "--into", tmp_path / "c")
    assert result.exit_code == 1, result.output
    assert "error: " in result.stderr
    assert not list(tmp_path.glob("c/checkpoint-*"))


WHOLE = {"step": 1, "size": 1, "metrics": {}, "states": []}
STATE = {"name": "s", "structure": None, "leaves": [["a", "a", "U8", [4]]]}


@pytest.mark.parametrize(
    "said",
    [
        {"step": "1"},
        {"step": 1.5},
        {"step": 2**70},
        {"size": 2**40},
        {"size": 0},
        {"metrics": {"m": "x"}},
        {"states": [STATE, STATE]},
        {"states": [{**STATE, "name": 7}]},
        {"states": [{**STATE, "structure": 10**4100}]},
        {"states": [{**STATE, "leaves": [["a", "\ud800", "U8", [4]]]}]},
        {"states": [{**STATE, "leaves": [["a", "x", "U8", [5]]]}]},
        {"states": [{**STATE, "leaves": [["b", "x", "U8", [4]]]}]},
    ],
)
def test_hostile_metadata_makes_no_generation(tmp_path, said):
    file = tmp_path / "x.safetensors"
    text = json.dumps({**WHOLE, **said})
    file.write_bytes(header({"a": ONE, "__metadata__": {"mpi_ckpt": text}}, b"abcd"))
    answer = ask("import", file, "--into", tmp_path / "c", code=1)
    assert answer["error"]
    assert not list(tmp_path.glob("c/checkpoint-*"))


def test_a_step_that_no_manifest_holds_is_refused(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "m.safetensors")
    words = ("import", tmp_path / "m.safetensors", "--into", tmp_path / "c")
    assert run(*words, "--step", 2**70).exit_code == 1
    assert not list(tmp_path.glob("c/checkpoint-*"))


def test_exports_prove_every_byte_and_leave_nothing_behind(tmp_path):
    root = fill(tmp_path / "c")
    path = root / "checkpoint-00000003" / "rank-00000.safetensors"
    flip(path, path.stat().st_size - 1)
    for name in ("x.safetensors", "x.pt"):
        answer = ask("export", root, "3", "--to", tmp_path / name, code=1)
        assert answer["error"]["kind"] == "CorruptGenerationError"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_files_are_not_overwritten(tmp_path):
    root = fill(tmp_path / "c", 1)
    (tmp_path / "x.pt").symlink_to(tmp_path / "nowhere")
    result = run("export", root, "--to", tmp_path / "x.pt")
    assert (result.exit_code, "exists" in result.stderr) == (2, True)
    assert run("export", root, "--to", tmp_path / "no" / "x.pt").exit_code == 2
    assert run("export", root, "--to", tmp_path / "x.what").exit_code == 2


def test_what_torch_cannot_hold_goes_as_safetensors(tmp_path):
    root = tmp_path / "c"
    publish(root, [ArrayState("s", {"dates": np.array(["2020-01-01"], "M8[D]")})])
    result = run("export", root, "--to", tmp_path / "x.pt")
    assert result.exit_code == 1
    assert "as safetensors instead" in result.stderr
    assert run("export", root, "--to", tmp_path / "x.safetensors").exit_code == 0


def test_without_torch_the_message_says_what_to_do(tmp_path, monkeypatch):
    root = fill(tmp_path / "c", 1)
    monkeypatch.setitem(sys.modules, "torch", None)
    answer = ask("export", root, "--to", tmp_path / "x.pt", code=1)
    assert "pip install 'mpi_ckpt[torch]'" in answer["error"]["message"]
    assert run("export", root, "--to", tmp_path / "x.safetensors").exit_code == 0
    (tmp_path / "y.pt").write_bytes(b"PK\x03\x04")
    assert (
        ask("import", tmp_path / "y.pt", "--into", root, code=1)["error"]["kind"]
        == "missing"
    )


def test_adaptdl_is_taken_on_the_users_word_only(tmp_path):
    old, root = tmp_path / "old", tmp_path / "c"
    for number in (0, 2):
        (old / f"checkpoint-{number}").mkdir(parents=True)
        (old / f"checkpoint-{number}" / "net").write_bytes(
            pickle.dumps([number, Payload()])
        )
        (old / f"checkpoint-{number}" / "adaptdl-epoch").write_bytes(b"x")
    refused = run("import", old, "--into", root)
    assert refused.exit_code == 2
    assert "--trust-pickle" in refused.stderr
    answer = ask("import", old, "--into", root, "--trust-pickle")
    assert (answer["states"], answer["left_out"]) == (["net"], ["adaptdl-epoch"])
    assert not os.path.exists("/tmp/mpi-ckpt-owned")
    stored = (root / "checkpoint-00000001" / "net.bin").read_bytes()
    assert stored == pickle.dumps([2, Payload()])
    assert run("import", tmp_path / "c", "--into", root).exit_code == 2


def test_a_running_job_refuses_an_import(tmp_path, monkeypatch):
    hasty = partial(DirectoryLock, patience_seconds=0.1)
    monkeypatch.setattr("mpi_ckpt.storage.owning.ownership.DirectoryLock", hasty)
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "m.safetensors")
    job = CheckpointDirectory(tmp_path / "c")
    with closing(job):
        job.own()
        save(job, [Stream("s")])
        result = run("import", tmp_path / "m.safetensors", "--into", tmp_path / "c")
    assert result.exit_code == 1
    assert "another running job" in result.stderr


@pytest.mark.parametrize(
    "words", [["--state", "s"], ["--as", "module", "--split"], ["--split"]]
)
def test_options_that_do_not_fit_the_file_are_named(tmp_path, words):
    root = fill(tmp_path / "c", 1)
    file = tmp_path / ("x.safetensors" if words[0] == "--state" else "x.pt")
    if file.suffix == ".pt":
        torch.save([1, 2], file)
    else:
        run("export", root, "--to", file)
    assert run("import", file, "--into", tmp_path / "d", *words).exit_code == 2


def test_values_and_modules_restore_in_place(tmp_path):
    torch.save({"lr": torch.ones(2), "x": torch.zeros(1)}, tmp_path / "v.pt")
    ask("import", tmp_path / "v.pt", "--into", tmp_path / "c", "--as", "values")
    with GenerationReader(tmp_path / "c" / "checkpoint-00000001") as reader:
        (state,) = reader.manifest.states
    live = ObjectState("v", {"lr": torch.zeros(2), "x": torch.ones(1)})
    specs = [leaf.spec for leaf in state.leaves]
    arrival = live.prepare(state.structure, specs, strict=True)
    assert [leaf.spec.name for leaf in arrival.leaves] == ["lr", "x"]
