# SPDX-License-Identifier: Apache-2.0
"""The short programs of the user pages run, each within what its page takes for granted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

import mpi_ckpt
from mpi_ckpt import ArrayState, CheckpointManager, TrainState

DOCS = Path(__file__).parents[2] / "docs"

# Other paths than shown.
PATHS = {
    "/local/ssd/{user}": "{tmp}/local",
    "/scratch/me/run": "{tmp}/run",
    "/var/lib/node_exporter/mpi_ckpt.prom": "{tmp}/mpi_ckpt.prom",
}


def blocks_of(page):
    text = (DOCS / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(block, tmp_path, **given):
    """Run a block where its names are given; return all its names."""
    for shown, there in PATHS.items():
        block = block.replace(shown, there.format(tmp=tmp_path))
    found = {name: getattr(mpi_ckpt, name) for name in mpi_ckpt.__all__}
    found |= {"comm": MPI.COMM_WORLD, "MPI": MPI, "np": np, "sys": sys, **given}
    exec(compile(block, "page", "exec"), found)
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


def test_states_page(tmp_path):
    rows, particles = blocks_of("states.md")
    fields = run(rows, tmp_path, T=np.arange(24.0).reshape(6, 4))["fields"]
    columns = {"x": np.arange(3.0), "ids": np.arange(3)}
    state = run(particles, tmp_path, **columns, owner_of=lambda x: np.zeros(len(x), int))[
        "particles"
    ]
    with CheckpointManager(tmp_path / "c", [fields, state]) as manager:
        manager.save()
        manager.restore()
    assert sorted(state.arrays) == ["id", "x"]


def test_options_page(tmp_path):
    member, busy = blocks_of("options.md")
    run(member, tmp_path, states=[ArrayState("a", {"x": np.zeros(2)})])
    written = []
    with CheckpointManager(
        tmp_path / "c", [ArrayState("a", {"x": np.zeros(2)})]
    ) as manager:
        run(busy, tmp_path, manager=manager, write_vtk=written.append, fields="fields")
        assert [one.generation for one in manager.generations()] == [1]
    assert written == ["fields"]


def test_notebooks_page(tmp_path, model, optimizer):
    (block,) = blocks_of("notebooks.md")
    rho = np.arange(6 * 2 * 2.0).reshape(6, 2, 2)
    fields = mpi_ckpt.ShardedArrayState(
        "fields", {"rho": mpi_ckpt.Block.rows(rho, MPI.COMM_WORLD)}
    )
    training = TrainState(model, optimizer)
    with CheckpointManager("checkpoints", [training, fields]) as manager:
        manager.save(1500, metrics={"loss": 0.33})
    found = run(block, tmp_path, model=model)
    assert (found["saved"].step, found["saved"].metrics) == (1500, {"loss": 0.33})


def test_local_page(tmp_path):
    (block,) = blocks_of("local.md")
    steps = np.zeros(1, np.int64)

    def train(batch):
        steps[0] += batch

    given = {"states": [ArrayState("a", {"steps": steps})], "train": train}
    run(block, tmp_path, **given, batches=[1] * 120)
    steps[0] = 0
    found = run(block, tmp_path, **given, batches=[1] * 3)
    # From a save that the host kept: of step 50 or 100, or soon after one that was written.
    assert steps[0] == found["manager"].steps
    assert 53 <= steps[0] <= 123


def test_observing_page(tmp_path, capsys):
    _, hooks, adapters = blocks_of("observing.md")
    options = run(hooks, tmp_path)["options"]
    state = ArrayState("a", {"x": np.zeros(2)})
    with CheckpointManager(tmp_path / "c", [state], options=options) as manager:
        manager.save(7)
    assert "generation 1 of step 7 is in " in capsys.readouterr().out
    pytest.importorskip("prometheus_client", reason="scripts/observe_tests brings it")
    # As on a rank that is not root: without the objects of the other libraries.
    nobody = dict.fromkeys(["writer", "run", "client", "run_id", "tracer", "meter"])
    assert "options" in run(adapters, tmp_path, **nobody)


AROUND_TORCH = """
import torch
from torch.nn.parallel import DistributedDataParallel
from mpi_ckpt import CheckpointManager, ElasticSampler, RNGState, TrainState

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
sampler = ElasticSampler(8, 4)
"""


def test_integrations_page_beside_torch_distributed(tmp_path):
    pytest.importorskip("torch")
    # In a process of its own: gloo keeps what it has opened.
    program = AROUND_TORCH + blocks_of("integrations.md")[0] + "print(states[0].name)"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert told.stdout == "train\n", told.stderr


def test_elastic_page(tmp_path):
    torch = pytest.importorskip("torch")
    nn = torch.nn.functional
    loss, places, _, _, shares = blocks_of("elastic.md")
    sampler = mpi_ckpt.ElasticSampler(8, 4)
    CheckpointManager(tmp_path / "c", [sampler]).close()
    dataset = [torch.ones(2) for _ in range(8)]
    from torch.utils.data import DataLoader

    given = {"dataset": dataset, "sampler": sampler, "DataLoader": DataLoader}
    model = torch.nn.Linear(2, 3)
    labels = torch.zeros(8, dtype=torch.long)
    found = run(
        loss,
        tmp_path,
        **given,
        ElasticCollate=mpi_ckpt.ElasticCollate,
        cross_entropy=nn.cross_entropy,
        model=model,
        images=torch.stack(dataset),
        labels=labels,
        gradients=[np.ones(2)],
        allreduce=lambda values: np.array([values[0].sum(), values[1]]),
    )
    assert found["gradients"].tolist() == [0.25]
    run(places, tmp_path, loader=found["loader"], sampler=sampler, epoch=0)
    found = run(shares, tmp_path)
    assert found["hard"].name == "hard samples"
    assert found["share_out"]([[1, 2], [3]], 3) == [[1], [2], [3]]


def test_distributed_page(tmp_path):
    blocks = [block for block in blocks_of("distributed.md") if "__main__" not in block]
    plate = np.zeros((8, 4))
    run(blocks[0], tmp_path, plate=plate, step=3)
    columns = {"x": np.zeros(3), "v": np.ones(3), "n": np.arange(3)}
    made = run(blocks[1], tmp_path, **columns, home=lambda rows: np.zeros(3, np.int64))
    assert sorted(made["particles"].arrays) == ["number", "position", "velocity"]


def test_adaptdl_page(tmp_path, model, optimizer):
    # Only here: the registry of this module is the process's.
    registered = []
    checkpoint = SimpleNamespace(register=registered.append)
    given = {"model": model, "optimizer": optimizer, "mpi_ckpt": mpi_ckpt}
    run(blocks_of("adaptdl.md")[1], tmp_path, checkpoint=checkpoint, **given)
    assert [state.name for state in registered] == ["train"]
