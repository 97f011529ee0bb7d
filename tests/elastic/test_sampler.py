# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.elastic.sampler import (
    ElasticSampler,
    count_batches,
    epoch_order,
    global_batches,
)
from mpi_ckpt.errors import CheckpointError, OptionsError, StateMismatchError
from tests.making import Ranks, carry


def job(size: int, *given, **named) -> list[ElasticSampler]:
    """Return the sampler of every rank of a job."""
    samplers = [ElasticSampler(*given, **named) for _ in range(size)]
    for rank, sampler in enumerate(samplers):
        sampler.bind(Ranks(rank, size))
    return samplers


def train(
    samplers: list[ElasticSampler], batches: int | None = None
) -> list[list[list[int]]]:
    """Train on some batches; return what each rank saw in each."""
    seen = []
    for parts in itertools.islice(zip(*samplers, strict=True), batches):
        seen.append(list(parts))
        for sampler in samplers:
            sampler.record_batch()
    return seen


def flat(batches: list[list[list[int]]]) -> list[int]:
    return [sample for batch in batches for part in batch for sample in part]


@given(
    length=st.integers(1, 60),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    runs=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(0, 6)), max_size=5
    ),
)
def test_every_sample_once_however_ranks_and_batches_change(length, shuffle, seed, runs):
    seen, position = [], None
    for size, batch, batches in [*runs, (1, 7, None)]:
        size = min(size, batch, length)
        samplers = job(size, length, batch, shuffle=shuffle, seed=seed)
        for sampler in samplers:
            if position is not None:
                carry(position, sampler)
            sampler.set_epoch(0)
        seen += flat(train(samplers, batches))
        position = samplers[0]
    assert sorted(seen) == list(range(length))


@given(st.integers(1, 80), st.integers(1, 20), st.integers(1, 8))
def test_parts_are_even_and_never_empty(length, batch, size):
    size = min(size, batch, length)
    samplers = job(size, length, batch)
    seen = train(samplers)
    for parts in seen:
        lengths = [len(part) for part in parts]
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 1
    assert all(sampler.remaining == 0 for sampler in samplers)


@given(st.integers(0, 50), st.integers(1, 20), st.integers(0, 50), st.integers(1, 20))
def test_batches_cover_what_is_left(length, batch, consumed, size):
    batches = list(global_batches(length, batch, consumed, size))
    assert [i for start, end in batches for i in range(start, end)] == list(
        range(consumed, length)
    )
    lengths = [end - start for start, end in batches]
    assert all(n <= max(batch, 2 * size - 1) for n in lengths)
    assert all(n >= min(size, batch) for n in lengths[:-1])
    assert all(n == batch for n in lengths[:-2])


@given(st.integers(1, 200), st.integers(2, 20), st.data())
def test_batches_are_the_same_for_all_numbers_of_ranks(length, batch, data):
    size = data.draw(st.integers(1, batch // 2))
    (alone,), many = job(1, length, batch), job(min(size, length), length, batch)
    assert [
        sorted(sample for part in parts for sample in part) for parts in train(many)
    ] == [sorted(samples) for samples in alone]


@given(st.integers(1, 200), st.integers(2, 20))
def test_no_batch_is_less_than_half_of_another(length, batch):
    lengths = [end - start for start, end in global_batches(length, batch, 0, 1)]
    assert max(lengths) <= 2 * min(lengths)
    assert len(lengths) == -(-length // batch)


@pytest.mark.parametrize(
    ("length", "batch", "size", "lengths"),
    [
        (103, 12, 4, [12] * 7 + [10, 9]),
        (24, 12, 4, [12, 12]),
        (25, 12, 6, [12, 7, 6]),
        (25, 12, 7, [12, 13]),
        (5, 12, 4, [5]),
    ],
)
def test_end_of_an_epoch_is_cut_as_documented(length, batch, size, lengths):
    batches = global_batches(length, batch, 0, size)
    assert [end - start for start, end in batches] == lengths


def test_part_is_empty_only_where_a_restart_finds_fewer_samples_than_ranks():
    (saved,) = job(1, 10, 4)
    train([saved], 2)
    samplers = job(4, 10, 4)
    for sampler in samplers:
        carry(saved, sampler)
    assert [len(part) for part in train(samplers)[0]] == [1, 1, 1, 0]


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 6), st.data())
def test_length_stays_that_of_an_epoch_and_the_rest_has_names(length, batch, size, data):
    size = min(size, batch, length)
    samplers = job(size, length, batch)
    total = len(samplers[0])
    assert total == len(list(samplers[0]))
    restart = data.draw(st.integers(0, total))
    for done in range(total + 1):
        if done == restart:
            fresh = job(size, length, batch)
            for sampler, saved in zip(fresh, samplers, strict=True):
                carry(saved, sampler)
            samplers = fresh
        for sampler in samplers:
            assert len(sampler) == total
            assert (sampler.batch_index, sampler.remaining) == (done, total - done)
            assert len(list(sampler)) == sampler.remaining
            assert sampler.is_exhausted == (done == total)
        train(samplers, 1)


@given(st.integers(-3, 300), st.integers(1, 20), st.integers(1, 20))
def test_batches_are_counted_as_they_are_cut(left, batch, size):
    batches = global_batches(max(left, 0), batch, 0, min(size, batch))
    assert count_batches(left, batch, min(size, batch)) == len(list(batches))


@given(
    *(st.integers(1, 80), st.integers(1, 20), st.integers(1, 20)),
    *(st.integers(1, 8), st.integers(1, 8), st.integers(0, 80)),
)
def test_the_index_is_sound_after_another_batch_size(length, old, new, n, m, batches):
    (saved,) = job(1, length, old)
    train([saved], batches)
    sampler = job(min(m, new, length), length, new)[0]
    carry(saved, sampler)
    assert 0 <= sampler.batch_index <= len(sampler)
    assert sampler.batch_index + sampler.remaining == len(sampler)


def test_length_is_known_before_the_ranks_are():
    sampler = ElasticSampler(103, 12)
    assert len(sampler) == len(job(4, 103, 12)[0]) == 9
    assert (sampler.batch_index, sampler.remaining) == (0, 9)


def test_a_length_that_changes_with_the_ranks_is_told(caplog):
    for rank in range(2):
        sampler = ElasticSampler(25, 12)
        assert len(sampler) == 3
        sampler.bind(Ranks(rank, 7))
        assert len(sampler) == 2
    (record,) = caplog.records  # root's
    assert "an epoch has 2 batches with 7 ranks, not 3" in record.getMessage()


def test_a_loop_over_batches_is_known_to_be_under_way():
    (sampler,) = job(1, 20, 4)
    assert not sampler.is_within
    for _ in sampler:
        assert sampler.is_within
        sampler.record_batch()
        assert sampler.is_within
    assert not sampler.is_within
    sampler.set_epoch(1)
    ahead = list(sampler)  # as a loader with workers asks
    assert not sampler.is_within
    for number, _ in enumerate(ahead, 1):
        sampler.record_batch()
        assert sampler.is_within == (number < len(ahead))


def test_iterating_moves_nothing_until_a_batch_is_recorded():
    (sampler,) = job(1, 10, 4, shuffle=False)
    assert list(sampler) == list(sampler) == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    sampler.record_batch()
    assert next(iter(sampler)) == [4, 5, 6]
    assert sampler.consumed == 4


def test_recording_beyond_the_end_stays_at_the_end():
    (sampler,) = job(1, 5, 4)
    for _ in range(4):
        sampler.record_batch()
    assert sampler.consumed == 5
    assert list(sampler) == []


def test_orders_differ_by_epoch_and_seed_and_are_fixed_for_ever():
    orders = {
        tuple(epoch_order(20, epoch, seed, shuffle=True))
        for epoch in range(5)
        for seed in range(5)
    }
    assert len(orders) == 25
    # Of a release gone by: a training that was saved then must go on in it.
    assert epoch_order(8, 3, 7, shuffle=True).tolist() == [5, 3, 1, 6, 7, 4, 2, 0]
    assert epoch_order(4, 3, 7, shuffle=False).tolist() == [0, 1, 2, 3]


def test_order_leaves_the_global_streams_alone():
    before = np.random.get_state()[1].tolist()
    list(job(1, 10, 4)[0])
    assert np.random.get_state()[1].tolist() == before


def test_same_epoch_keeps_the_position_and_another_starts_anew():
    (sampler,) = job(1, 10, 4)
    sampler.record_batch()
    sampler.set_epoch(0)
    assert sampler.consumed == 4
    sampler.set_epoch(1)
    assert (sampler.epoch, sampler.consumed) == (1, 0)


def test_position_is_two_numbers_beside_what_the_sampler_is():
    (saved,) = job(1, 10, 4, seed=3)
    saved.set_epoch(2)
    saved.record_batch()
    captured = saved.capture()
    assert captured.leaves == ()
    assert captured.structure == {
        "length": 10, "shuffle": True, "seed": 3, "epoch": 2, "consumed": 4,
        "batch_size": 4,
    }  # fmt: skip
    live = ElasticSampler(10, 6, seed=3)
    carry(saved, live)
    assert (live.epoch, live.consumed) == (2, 4)


def test_numbers_of_numpy_are_saved_as_plain_ones():
    numbers = np.array([10, 4, 3])
    (saved,) = job(1, *numbers[:2], seed=numbers[2], shuffle=np.bool_(1))
    for epoch in np.arange(2):
        saved.set_epoch(epoch)
    saved.record_batch()
    live = ElasticSampler(10, 4, seed=3)
    carry(saved, live)
    assert json.loads(json.dumps(saved.capture().structure)) == live.capture().structure


def test_a_seed_that_is_no_number_is_refused():
    with pytest.raises(OptionsError, match="seed is of type float"):
        ElasticSampler(10, 4, seed=1.5)


def test_another_data_set_or_order_is_a_mismatch_and_all_of_it_is_told():
    live = ElasticSampler(11, 4, shuffle=False, seed=1)
    with pytest.raises(StateMismatchError) as caught:
        carry(ElasticSampler(10, 4), live)
    assert len(caught.value.problems) == 3
    assert (live.epoch, live.consumed) == (0, 0)


@pytest.mark.parametrize(
    "position",
    [
        {},
        {"epoch": 1},
        {"epoch": 1, "consumed": -1},
        {"epoch": True, "consumed": 0},
        {"epoch": 0, "consumed": 1.0},
    ],
)
def test_positions_that_are_none_are_a_mismatch(position):
    structure = {"length": 10, "shuffle": True, "seed": 0, **position}
    with pytest.raises(StateMismatchError, match="no position"):
        ElasticSampler(10, 4).prepare(structure, [], strict=True)
    for structure in (None, [], 5):
        with pytest.raises(StateMismatchError):
            ElasticSampler(10, 4).prepare(structure, [], strict=True)


@pytest.mark.parametrize("given", [(0, 4), (10, 0), (-1, 4)])
def test_sizes_out_of_range_are_refused(given):
    with pytest.raises(OptionsError, match="at least 1"):
        ElasticSampler(*given)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(OptionsError, match="seed"):
        ElasticSampler(10, 4, seed=seed)


def test_more_ranks_than_a_batch_has_samples_are_refused():
    for length, batch in ((10, 3), (3, 10)):
        ElasticSampler(length, batch).bind(Ranks(0, 3))
        with pytest.raises(OptionsError, match="4 ranks cannot share batches of 3"):
            ElasticSampler(length, batch).bind(Ranks(0, 4))


def test_replicas_that_disagree_about_the_position_are_an_error():
    assert ElasticSampler(10, 4).sync_mode == "check"


def test_a_sampler_that_does_not_know_its_rank_gives_no_batch():
    sampler = ElasticSampler(10, 4)
    for use in (list, ElasticSampler.record_batch):
        with pytest.raises(CheckpointError, match="belongs to no manager"):
            use(sampler)


def as_documented(length, batch_size, *, seed, epoch, consumed, size):
    """Return the batches left, by rank, computed from docs/elastic.md alone."""
    order = np.random.RandomState([seed, epoch]).permutation(length).tolist()
    batches = []
    while (left := length - consumed) > 0:
        if left >= 2 * batch_size:
            take = batch_size
        elif left <= batch_size or left // 2 < size:
            take = left
        else:
            take = (left + 1) // 2
        batch = order[consumed : consumed + take]
        batches.append([batch[rank::size] for rank in range(size)])
        consumed += take
    return batches


@given(
    length=st.integers(1, 120),
    batch=st.integers(1, 20),
    epoch=st.integers(0, 9),
    consumed=st.integers(0, 120),
    size=st.integers(1, 8),
)
def test_stranger_can_compute_the_order(length, batch, epoch, consumed, size):
    size = min(size, batch, length)
    samplers = job(size, length, batch, seed=5)
    for sampler in samplers:
        sampler.set_epoch(epoch)
        sampler.consumed = consumed
    told = {"seed": 5, "epoch": epoch, "consumed": consumed, "size": size}
    assert train(samplers) == as_documented(length, batch, **told)
