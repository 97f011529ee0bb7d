# SPDX-License-Identifier: Apache-2.0
"""Fewer samples left of an epoch than there are ranks: the example's step still holds."""

import sys
from pathlib import Path

import pytest

from mpi_ckpt import ElasticCollate, ElasticSampler, TrainState
from tests.ranks import assert_same, manager

torch = pytest.importorskip("torch")

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def train_on(monkeypatch):
    """The step of examples/train.py."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield pytest.importorskip("train").train_on
    for name in ("train", "digits"):
        sys.modules.pop(name, None)


class Descent:
    """An optimizer that is imported in no time, unlike torch's."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def step(self):
        with torch.no_grad():
            for parameter in self.parameters:
                parameter -= 0.1 * parameter.grad


class Training:
    """A small network and its samples, the same on every rank."""

    def __init__(self, length, batch_size):
        torch.manual_seed(1)
        images = torch.randn(length, 6)
        self.data = torch.utils.data.TensorDataset(images, torch.arange(length) % 3)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
        self.optimizer = Descent(self.model.parameters())
        self.sampler = ElasticSampler(length, batch_size)
        self.states = [TrainState(module=self.model), self.sampler]

    def batches(self):
        """Give this rank's batches, and record each once it was trained on."""
        collate = ElasticCollate(self.data)
        loader = torch.utils.data.DataLoader(
            self.data, batch_sampler=self.sampler, collate_fn=collate
        )
        for batch in loader:
            yield batch
            self.sampler.record_batch()

    def run(self, step, comm, steps=None):
        """Train, up to a number of steps; return the samples of this rank in each."""
        counts = []
        for batch in self.batches():
            step(batch, self.model, self.optimizer, comm)
            counts.append(len(batch[0]))
            if len(counts) == steps:
                # The generator has not recorded it: nobody asks it for another batch.
                self.sampler.record_batch()
                break
        return counts

    def weights(self):
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()


def test_last_batch_with_a_sample_for_some_ranks_only(peers, shared_path, train_on):
    size = peers.size
    length = size + size // 2  # two batches for one rank, the second below size
    alone = peers.Split(peers.rank, 0)
    whole = Training(length, size)
    with manager(shared_path / f"{peers.rank}", *whole.states, comm=alone) as checkpoints:
        whole.run(train_on, alone, steps=1)
        checkpoints.save()
        assert whole.run(train_on, alone) == [length // 2]

    resumed = Training(length, size)
    with manager(shared_path / "0", *resumed.states) as checkpoints:
        checkpoints.restore()
        (count,) = resumed.run(train_on, peers)
    alone.Free()
    counts = peers.allgather(count)
    assert counts == [1] * (length // 2) + [0] * (size - length // 2)
    assert torch.isfinite(resumed.weights()).all()
    assert torch.allclose(resumed.weights(), whole.weights(), atol=1e-6)
    assert_same(peers, resumed.weights().tolist())
