# SPDX-License-Identifier: Apache-2.0
"""Loops that are cut off and resumed, by as many ranks as saved and by others."""

import logging

import numpy as np
import pytest
from mpi4py import MPI

from mpi_ckpt import (
    Accumulator,
    ElasticSampler,
    EpochState,
    ObjectState,
    OptimizerState,
    TrainState,
    remaining_epochs_until,
)
from tests.ranks import assert_same, manager, same_error

torch = pytest.importorskip("torch")

SAMPLES, BATCH = 26, 8


def told_by_root(comm, caplog, level=logging.WARNING):
    """Return what was logged; require the other ranks to be silent."""
    texts = [r.getMessage() for r in caplog.records if r.levelno >= level]
    assert comm.rank == 0 or texts == []
    return comm.bcast(texts)


def make_states():
    epochs = EpochState()
    sampler = ElasticSampler(SAMPLES, BATCH)
    return epochs, sampler, Accumulator(epochs=epochs)


def train(checkpoints, states, batches):
    """Train on so many batches of one epoch; return what is told in and after its loop."""
    epochs, sampler, sums = states
    told = {}
    for epoch in remaining_epochs_until(1, epochs):
        sampler.set_epoch(epoch)
        for number, samples in enumerate(sampler, sampler.batch_index):
            sums["samples"] += len(samples)
            sums["ids"] += np.bincount(samples, minlength=SAMPLES)
            with sums.synchronized():
                told[number] = sums["samples"]
            sampler.record_batch()
            if number + 1 == batches:
                checkpoints.save()
                return told
        sums["evaluated"] += 1
        with sums.synchronized():
            told["end"] = (sums["samples"], sums["evaluated"], sums["ids"].tolist())
    return told


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_no_sample_is_lost_or_counted_twice(comm, shared_path, cut, caplog):
    with manager(shared_path, *make_states()) as checkpoints:
        told = train(checkpoints, checkpoints._registry._states.values(), cut)
    states = make_states()
    with manager(shared_path, *states) as checkpoints:
        checkpoints.restore()
        told |= train(checkpoints, states, None)
    assert_same(comm, told)
    assert [told[number] for number in range(4)] == [8, 16, 21, 26]
    assert told["end"] == (SAMPLES, comm.size, [1] * SAMPLES)
    warnings = told_by_root(comm, caplog)
    assert len(warnings) == (cut == 4), warnings
    assert all("epoch 0 is about to be repeated" in text for text in warnings)


def test_sums_of_all_ranks_in_a_loop_over_steps(comm, shared_path):
    for start in (0, 10, 20):
        sums = Accumulator()
        with manager(shared_path, sums, interval=5) as checkpoints:
            checkpoints.restore()
            assert checkpoints.steps == start
            for step in range(start + 1, start + 11):
                sums["n"] += comm.rank + 1
                if step % 5 == 0:
                    with sums.synchronized():
                        assert sums["n"] == step * comm.size * (comm.size + 1) // 2
                checkpoints.step()


def test_ranks_agree_where_they_are(peers, shared_path):
    epochs, sampler, sums = states = make_states()
    with manager(shared_path, *states):
        for _ in remaining_epochs_until(1, epochs):
            # An iteration that one rank has not let go of yet, as in a cycle of objects.
            held = iter(sampler)
            if peers.rank == peers.size - 1:
                next(held)
            sums["n"] += 1
            with sums.synchronized():
                assert sums["n"] == peers.size
            assert_same(peers, len(sums._history))
            assert sums._history == []


def test_values_of_every_kind_are_summed_and_saved(comm, shared_path):
    third = np.longdouble(1) / 3
    sums = Accumulator()
    with manager(shared_path, sums) as checkpoints:
        sums += {"c": 1j, "long": third, "longs": np.array([third, 1])}
        sums["brain"] += torch.full((2,), 1.5, dtype=torch.bfloat16)
        checkpoints.save()
    fresh = Accumulator()
    with manager(shared_path, fresh) as checkpoints:
        checkpoints.restore()
        with fresh.synchronized():
            assert fresh["c"] == comm.size * 1j
            total = sum([third] * comm.size, np.longdouble(0))
            assert fresh["long"] == fresh["longs"][0] == total
            assert fresh["brain"].tolist() == [1.5 * comm.size] * 2


def test_epochs_that_are_done_are_not_repeated(comm, shared_path, caplog):
    for run in range(3):
        epochs = EpochState()
        sampler = ElasticSampler(SAMPLES, BATCH)
        with manager(shared_path, epochs, sampler) as checkpoints:
            checkpoints.restore()
            for epoch in remaining_epochs_until(3, epochs):
                assert epoch == run
                sampler.set_epoch(epoch)
                assert sampler.remaining == len(sampler)
                for _ in sampler:
                    sampler.record_batch()
                epochs.done()
                checkpoints.save()
                break
    assert told_by_root(comm, caplog) == []


def test_a_call_that_is_wrong_is_wrong_on_every_rank(comm):
    with same_error(comm, RuntimeError, "no loop over 'epochs' is running"):
        EpochState().done()


def saved_by_one_rank(comm, path, *states):
    """Save with root alone; return when it is done."""
    if comm.rank == 0:
        with manager(path, *states, comm=MPI.COMM_SELF) as checkpoints:
            checkpoints.save()
    comm.barrier()


def make_training(rate):
    module = torch.nn.Linear(2, 1)
    return module, torch.optim.SGD(module.parameters(), lr=rate)


def test_what_another_number_of_ranks_changes_is_said_once(comm, shared_path, caplog):
    caplog.set_level(logging.INFO)
    module, optimizer = make_training(0.1)
    saved = [TrainState(module=module, optimizer=optimizer), ElasticSampler(SAMPLES, 8)]
    saved_by_one_rank(comm, shared_path, *saved)
    caplog.clear()
    module, optimizer = make_training(0.1 * comm.size)
    train = TrainState(module=module, optimizer=optimizer)
    with manager(shared_path, train, ElasticSampler(SAMPLES, 8)) as checkpoints:
        checkpoints.restore()
    texts = told_by_root(comm, caplog, logging.INFO)
    lines = [text for text in texts if text.startswith("restored on")]
    share = {2: "4", 3: "2 to 3", 4: "2"}
    expected = (
        f"restored on {comm.size} ranks a generation that 1 saved; train/optimizer: the "
        f"learning rate is 0.1, the program had {0.1 * comm.size:g}; sampler: a batch "
        f"of 8 samples is {share.get(comm.size)} a rank, no longer 8"
    )
    assert lines == ([] if comm.size == 1 else [expected])


def test_a_single_rank_is_no_plural(peers, shared_path, caplog):
    caplog.set_level(logging.INFO)
    with manager(shared_path, ObjectState("a", 1)) as checkpoints:
        checkpoints.save()
    if peers.rank == 0:
        with manager(shared_path, ObjectState("a", 1), comm=MPI.COMM_SELF) as checkpoints:
            checkpoints.restore()
        assert f"restored on 1 rank a generation that {peers.size} saved" in caplog.messages
    peers.barrier()


@pytest.mark.parametrize("rescaled", [True, False])
def test_a_rate_that_the_program_sets_right_is_no_news(
    peers, shared_path, caplog, rescaled
):
    saved_by_one_rank(peers, shared_path, OptimizerState("o", make_training(0.5)[1]))
    optimizer = make_training(0.5 * peers.size)[1]

    def rescale(old, new):
        for group in optimizer.param_groups:
            group["lr"] *= new / old if rescaled else 1

    caplog.clear()
    with manager(shared_path, OptimizerState("o", optimizer)) as checkpoints:
        checkpoints.restore(on_resize=rescale)
    texts = [t for t in told_by_root(peers, caplog) if t.startswith("restored on")]
    assert len(texts) == (not rescaled)


def test_another_batch_size_is_a_warning(peers, shared_path, caplog):
    saved_by_one_rank(peers, shared_path, ElasticSampler(SAMPLES, 4))
    caplog.clear()
    with manager(shared_path, ElasticSampler(SAMPLES, 12)) as checkpoints:
        checkpoints.restore()
    (text,) = told_by_root(peers, caplog)
    assert "it was saved with batches of 4, 4 a rank" in text
