# SPDX-License-Identifier: Apache-2.0
"""Sharing a data set out as Horovod elastic does, without MPI."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.integrations.horovod import ElasticSampler


def samplers(length, size, **options):
    made = [ElasticSampler(range(length), **options) for _ in range(size)]
    for rank, sampler in enumerate(made):
        sampler.place(rank, size)
    return made


def test_the_order_is_horovods():
    order = list(range(10))
    random.Random(7 + 3).shuffle(order)
    first, second = samplers(10, 2, seed=7)
    for indices in (first, second):
        indices.set_epoch(3)
    assert list(first) == order[0::2]
    assert list(second) == order[1::2]


@given(
    length=st.integers(1, 60),
    size=st.integers(1, 7),
    batches=st.integers(0, 8),
    batch=st.integers(1, 9),
    new_size=st.integers(1, 7),
)
def test_with_another_number_of_ranks_the_rest_is_read(
    length, size, batches, batch, new_size
):
    before = samplers(length, size)
    read = [list(indices) for indices in before]
    taken = min(batches * batch, len(read[0]))
    done = {index for indices in read for index in indices[:taken]}
    for number, start in enumerate(range(0, taken, batch)):
        for indices in before:
            indices.record_batch(number, min(batch, taken - start))
    after = samplers(length, new_size)
    for indices in after:
        indices.load_state_dict(before[0].state_dict())
    rest = [list(indices) for indices in after]
    assert len({len(indices) for indices in rest}) == 1
    assert [len(indices) for indices in after] == [len(indices) for indices in rest]
    assert {index for indices in rest for index in indices} == set(range(length)) - done


def test_an_epoch_that_is_being_sampled_is_gone_on_with():
    (sampler,) = samplers(10, 1, shuffle=False)
    sampler.record_batch(0, 4)
    assert list(sampler) == list(range(10)), "not shared out again by itself"
    sampler.set_epoch(0)
    assert list(sampler) == [4, 5, 6, 7, 8, 9]
    sampler.set_epoch(1)
    assert len(sampler) == 10
    assert sampler.state_dict() == {"epoch": 1, "processed_num": 0}


def test_a_new_place_shares_out_anew_and_the_same_place_does_not():
    (sampler,) = samplers(8, 1, shuffle=False)
    assert len(sampler) == 8
    sampler.record_batch(0, 2)
    sampler.place(0, 1)
    assert len(sampler) == 8
    sampler.place(1, 2)
    assert list(sampler) == [3, 5, 7]
    assert (sampler.rank, sampler.num_replicas) == (1, 2)


@pytest.mark.parametrize("size", [1, 3])
def test_a_finished_epoch_has_nothing_left(size):
    for sampler in samplers(7, size):
        sampler.record_batch(0, len(sampler))
        sampler.load_state_dict(sampler.state_dict())
        assert list(sampler) == []
