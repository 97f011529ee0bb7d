# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from mpi_ckpt import ElasticCollate, ElasticSampler
from tests.making import Ranks, carry

Pair = namedtuple("Pair", "image label")

SAMPLES = {
    "tensor": torch.arange(6.0).reshape(2, 3),
    "number": 3,
    "float": 2.5,
    "array": np.ones((4,), np.float32),
    "fields": (torch.zeros(3, 4), 7),
    "named": Pair(torch.zeros(5), 1),
    "mapping": {"image": torch.zeros(2, 2), "name": "a text", "more": [1, 2.0]},
    "text": "a text",
}


def form(batch):
    """Return types, dtypes and the dimensions behind the first."""
    if isinstance(batch, torch.Tensor):
        return batch.dtype, tuple(batch.shape[1:])
    if isinstance(batch, dict):
        return {key: form(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not all(isinstance(x, str) for x in batch):
        return type(batch), [form(sample) for sample in batch]
    return type(batch)


def lengths(batch):
    if isinstance(batch, dict):
        return {n for value in batch.values() for n in lengths(value)}
    if isinstance(batch, (list, tuple)) and not all(isinstance(x, str) for x in batch):
        return {n for sample in batch for n in lengths(sample)}
    return {len(batch)}


@pytest.mark.parametrize("kind", SAMPLES)
def test_batch_of_no_samples_has_the_form_of_any_other(kind):
    sample = SAMPLES[kind]
    collate = pickle.loads(pickle.dumps(ElasticCollate([sample])))
    empty = collate([])
    assert lengths(empty) == {0}
    assert form(empty) == form(default_collate([sample, sample]))
    assert str(collate([sample, sample])) == str(default_collate([sample, sample]))


def test_collate_of_your_own_is_used():
    collate = ElasticCollate([5], lambda samples: torch.tensor(samples) * 2)
    assert collate([1, 2]).tolist() == [2, 4]
    assert collate([]).shape == (0,)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_gives_a_batch_to_ranks_without_a_sample(workers):
    images, labels = torch.arange(30.0).reshape(10, 3), torch.arange(10)
    dataset = TensorDataset(images, labels)
    saved = ElasticSampler(10, 8)
    saved.bind(Ranks(0, 1))
    saved.record_batch()  # 8 and 2 would be uneven: 5 and 5
    assert saved.consumed == 5
    seen = []
    for rank in range(7):
        sampler = ElasticSampler(10, 8)
        carry(saved, sampler)
        sampler.bind(Ranks(rank, 7))
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=ElasticCollate(dataset),
            num_workers=workers if rank == 6 else 0,
        )
        ((batch, truth),) = loader
        assert (batch.shape[1:], batch.dtype) == ((3,), torch.float32)
        assert len(batch) == len(truth) == (rank < 5)
        seen += truth.tolist()
    assert len(set(seen)) == 5


def test_sum_over_no_samples_has_gradients_of_zero():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    images, labels = ElasticCollate([(torch.zeros(3), 1)])([])
    loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())
