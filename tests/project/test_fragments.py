# SPDX-License-Identifier: Apache-2.0
"""The short programs of the user pages run, each within what its page takes for granted."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

import mpi_ckpt
from mpi_ckpt import ArrayState, CheckpointManager, TrainState
from tests.project.pages import shows, take

# Other paths than shown.
PATHS = {
    "/local/ssd/{user}": "{tmp}/local",
    "/scratch/me/run": "{tmp}/run",
    "/var/lib/node_exporter/mpi_ckpt.prom": "{tmp}/mpi_ckpt.prom",
}


def run(page, number, tmp_path, **given):
    """Run a block where its names are given; return all its names."""
    block = take(f"docs/{page}.md", number)
    for shown, there in PATHS.items():
        block = block.replace(shown, there.format(tmp=tmp_path))
    found = {name: getattr(mpi_ckpt, name) for name in mpi_ckpt.__all__}
    found |= {"comm": MPI.COMM_WORLD, "MPI": MPI, "np": np, "sys": sys, **given}
    exec(compile(block, page, "exec"), found)
    return found


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential()
    module.add_module("head", torch.nn.Linear(2, 1))
    return module


@pytest.fixture
def optimizer(model):
    import torch

    return torch.optim.SGD(model.parameters(), lr=0.1)


@shows("docs/states.md", 0, 1)
def test_states_page(tmp_path):
    fields = run("states", 0, tmp_path, T=np.arange(24.0).reshape(6, 4))["fields"]
    given = {"x": np.arange(3.0), "ids": np.arange(3)}
    given["owner_of"] = lambda x: np.zeros(len(x), int)
    state = run("states", 1, tmp_path, **given)["particles"]
    with CheckpointManager(tmp_path / "c", [fields, state]) as manager:
        manager.save()
        manager.restore()
    assert sorted(state.arrays) == ["id", "x"]


@shows("docs/options.md", 0, 1)
def test_options_page(tmp_path):
    state = ArrayState("a", {"x": np.zeros(2)})
    run("options", 0, tmp_path, states=[state])
    written = []
    with CheckpointManager(tmp_path / "c", [state]) as manager:
        given = {"write_vtk": written.append, "fields": "fields"}
        run("options", 1, tmp_path, manager=manager, **given)
        assert [one.generation for one in manager.generations()] == [1]
    assert written == ["fields"]


@shows("docs/notebooks.md", 0)
def test_notebooks_page(tmp_path, model, optimizer):
    rho = np.arange(6 * 2 * 2.0).reshape(6, 2, 2)
    fields = mpi_ckpt.ShardedArrayState(
        "fields", {"rho": mpi_ckpt.Block.rows(rho, MPI.COMM_WORLD)}
    )
    training = TrainState(model, optimizer)
    with CheckpointManager("checkpoints", [training, fields]) as manager:
        manager.save(1500, metrics={"loss": 0.33})
    found = run("notebooks", 0, tmp_path, model=model)
    assert (found["saved"].step, found["saved"].metrics) == (1500, {"loss": 0.33})


@shows("docs/local.md", 0)
def test_local_page(tmp_path):
    steps = np.zeros(1, np.int64)

    def train(batch):
        steps[0] += batch

    given = {"states": [ArrayState("a", {"steps": steps})], "train": train}
    run("local", 0, tmp_path, **given, batches=[1] * 120)
    steps[0] = 0
    found = run("local", 0, tmp_path, **given, batches=[1] * 3)
    # From a save that the host kept: of step 50 or 100, or soon after one that was written.
    assert steps[0] == found["manager"].steps
    assert 53 <= steps[0] <= 123


@shows("docs/observing.md", 1)
def test_observing_page(tmp_path, capsys):
    options = run("observing", 1, tmp_path)["options"]
    state = ArrayState("a", {"x": np.zeros(2)})
    with CheckpointManager(tmp_path / "c", [state], options=options) as manager:
        manager.save(7)
    assert "generation 1 of step 7 is in " in capsys.readouterr().out


@shows("docs/observing.md", 0)
def test_log_of_the_observing_page(tmp_path, own_logging):
    logging.getLogger().handlers.clear()  # pytest's, with which basicConfig does nothing
    run("observing", 0, tmp_path)
    assert logging.getLogger("mpi_ckpt").isEnabledFor(logging.INFO)


@shows("docs/observing.md", 2)
def test_adapters_of_the_observing_page(tmp_path):
    pytest.importorskip("prometheus_client", reason="scripts/observe_tests brings it")
    # As on a rank that is not root: without the objects of the other libraries.
    nobody = dict.fromkeys(["writer", "run", "client", "run_id", "tracer", "meter"])
    assert "options" in run("observing", 2, tmp_path, **nobody)


@shows("docs/elastic.md", 0, 1, 4, 5)
def test_elastic_page(tmp_path):
    torch = pytest.importorskip("torch")
    sampler = mpi_ckpt.ElasticSampler(8, 4)
    CheckpointManager(tmp_path / "c", [sampler]).close()
    dataset = [torch.ones(2) for _ in range(8)]
    from torch.utils.data import DataLoader

    given = {"dataset": dataset, "sampler": sampler, "DataLoader": DataLoader}
    given |= {"model": torch.nn.Linear(2, 3), "images": torch.stack(dataset)}
    found = run(
        "elastic",
        0,
        tmp_path,
        **given,
        cross_entropy=torch.nn.functional.cross_entropy,
        labels=torch.zeros(8, dtype=torch.long),
        gradients=[np.ones(2)],
        allreduce=lambda values: np.array([values[0].sum(), values[1]]),
    )
    assert found["gradients"].tolist() == [0.25]
    run("elastic", 1, tmp_path, loader=found["loader"], sampler=sampler, epoch=0)
    found = run("elastic", 4, tmp_path)
    assert found["hard"].name == "hard samples"
    assert found["hard"].value == []
    assert found["share_out"]([[1, 2], [3]], 3) == [[1], [2], [3]]
    yielding = run("elastic", 5, tmp_path)["share_out"]
    assert list(yielding([[1, 2], [3], [4]], 2)) == [[1, 2, 4], [3]]


@shows("docs/distributed.md", 0, 2)
def test_distributed_page(tmp_path):
    plate = np.zeros((8, 4))
    run("distributed", 0, tmp_path, plate=plate, step=3)
    columns = {"x": np.zeros(3), "v": np.ones(3), "n": np.arange(3)}
    given = {**columns, "home": lambda rows: np.zeros(3, np.int64)}
    particles = run("distributed", 2, tmp_path, **given)["particles"]
    assert sorted(particles.arrays) == ["number", "position", "velocity"]


@shows("docs/adaptdl.md", 0)
def test_imports_of_the_adaptdl_page():
    """Two programs side by side: the one on the right runs."""
    lines = take("docs/adaptdl.md", 0).splitlines()
    column = lines[0].index("# after")
    found = {}
    exec("\n".join(line[column:] for line in lines), found)
    assert found["checkpoint"] is mpi_ckpt.checkpoint
    assert found["Accumulator"] is mpi_ckpt.checkpoint.Accumulator


@shows("docs/adaptdl.md", 1)
def test_adaptdl_page(tmp_path, model, optimizer):
    # Only here: the registry of this module is the process's.
    registered = []
    checkpoint = SimpleNamespace(register=registered.append)
    given = {"model": model, "optimizer": optimizer, "mpi_ckpt": mpi_ckpt}
    run("adaptdl", 1, tmp_path, checkpoint=checkpoint, **given)
    assert [state.name for state in registered] == ["train"]
