# SPDX-License-Identifier: Apache-2.0
"""Mistakes of the first hour that a manager sees: one error on all ranks, with advice."""

import logging

import numpy as np
import pytest

from mpi_ckpt import (
    ArrayState,
    CheckpointManager,
    ElasticSampler,
    KeepBest,
    ObjectState,
    TrainState,
)
from mpi_ckpt.errors import (
    CollectiveError,
    LaunchError,
    NoCheckpointError,
    OptionsError,
    ReadError,
    RegistrationError,
    SaveError,
    StateMismatchError,
)
from tests.ranks import coming_late, manager, same_error

torch = pytest.importorskip("torch")


def last(comm):
    return comm.rank == comm.size - 1


def model(size=2):
    return torch.nn.Linear(size, 2)


def counter():
    return ObjectState("counter", 1)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("states", "texts"),
    [
        (lambda: [model()], ["a Linear is not a State", "TrainState(module=...)"]),
        (lambda: model(), ["not a list of states", "TrainState(module=...)"]),
        (lambda: [model().state_dict()], ["give the model itself"]),
        (lambda: counter(), ["[state]"]),
        (lambda: {"a": counter()}, ["give a list of states"]),
        (lambda: [counter(), counter()], ["'counter' is given twice"]),
    ],
)
def test_wrong_states(comm, shared_path, states, texts):
    with same_error(comm, RegistrationError, *texts):
        CheckpointManager(shared_path / "run", states())


def test_a_wrong_state_on_one_rank(comm, shared_path):
    given = [model()] if last(comm) else [counter()]
    where = f"rank {comm.size - 1} of {comm.size}"
    with same_error(comm, RegistrationError, where, "wrap it in TrainState(module=...)"):
        CheckpointManager(shared_path / "run", given)


def test_wrong_arguments_of_a_manager(comm, shared_path):
    for root in (None, "", 3):
        with same_error(comm, OptionsError, "give the path of a directory"):
            CheckpointManager(root, [counter()])
    with same_error(comm, OptionsError, "not Options", "Options(interval=500, ...)"):
        CheckpointManager(shared_path, [counter()], options={"interval": 3})
    with same_error(comm, LaunchError, "comm is 3", "MPI.COMM_WORLD"):
        CheckpointManager(shared_path, [counter()], comm=3)


CALLS = {
    "a file as step": (
        lambda m: m.save("model.pt"),
        *(SaveError, "step is 'model.pt'", "an int", "the directory is given"),
    ),
    "half a step": (lambda m: m.save(1.5), SaveError, "step is 1.5"),
    "one metric": (
        lambda m: m.save(metrics=0.5),
        *(SaveError, "metrics is 0.5", "metrics={'loss': 0.5}"),
    ),
    "a metric of many numbers": (
        lambda m: m.save(metrics={"loss": torch.ones(2)}),
        *(SaveError, "metric 'loss' is of type Tensor", "loss.item()"),
    ),
    "a metric without a text for a name": (
        lambda m: m.save(metrics={1: 0.5}),
        *(SaveError, "the name of a metric is 1", "metrics={'loss': 0.5}"),
    ),
    "half a character for a name": (
        lambda m: m.save(metrics={"\ud800": 0.5}),
        *(SaveError, "the name of a metric is '\\ud800'"),
    ),
    "a metric without end": (
        lambda m: m.save(metrics={"loss": 10**400}),
        *(SaveError, "metric 'loss' is too large"),
    ),
    "a step without end": (
        lambda m: m.save(1 << 64),
        *(SaveError, "step is 18446744073709551616"),
    ),
    "a level that there is not": (
        lambda m: m.save(level="hosts"),
        *(OptionsError, "level='hosts'", "'directory' or 'local'"),
    ),
    "a name for names": (
        lambda m: m.save(only="counter"),
        *(RegistrationError, "only='counter' is a text", "['counter']"),
    ),
    "a directory to restore": (
        lambda m: m.restore("checkpoint-00000001"),
        *(RegistrationError, "is a text", "restore(generation=...)"),
    ),
    "a typing error": (
        lambda m: m.restore(only=["countre"]),
        *(RegistrationError, "'countre'", "the states of this manager are: 'counter'"),
    ),
    "a generation that is not there": (
        lambda m: m.restore(generation=7),
        *(NoCheckpointError, "has no generation 7; there are: none"),
    ),
    "the best of no metric": (
        lambda m: m.restore(best="los"),
        *(OptionsError, "best='los'", "mode='min' or mode='max'"),
    ),
}


@pytest.mark.parametrize(
    ("call", "error", "texts"),
    [
        pytest.param(call, error, texts, id=name)
        for name, (call, error, *texts) in CALLS.items()
    ],
)
def test_wrong_calls_change_nothing(comm, shared_path, call, error, texts):
    with manager(shared_path, counter()) as checkpoints:
        with same_error(comm, error, *texts):
            call(checkpoints)
        assert checkpoints.generations() == []
        checkpoints.save()  # the next one is not spoiled
        assert len(checkpoints.generations()) == 1


def test_a_manager_without_states(comm, shared_path):
    with manager(shared_path) as checkpoints:
        with same_error(comm, RegistrationError, "has no states", "by add(state)"):
            checkpoints.save()
        checkpoints.add(counter())
        checkpoints.save()


@pytest.mark.parametrize("call", ["save", "step", "restore", "sync", "should_stop"])
def test_after_close(comm, shared_path, call):
    checkpoints = manager(shared_path, counter())
    checkpoints.close()
    closed = f"{call}(): this manager is closed; make another to save or restore"
    with same_error(comm, CollectiveError, closed):
        getattr(checkpoints, call)()


def test_a_file_in_place_of_the_directory(comm, shared_path):
    if comm.rank == 0:
        (shared_path / "file").touch()
    for place in ("file", "file/below"):
        with manager(shared_path / place, counter()) as checkpoints:
            texts = [str(shared_path / "file"), "a file is where a directory is needed"]
            with same_error(comm, SaveError, *texts):
                checkpoints.save()
            with same_error(comm, ReadError, *texts):
                checkpoints.restore()


def test_parents_are_made(comm, shared_path):
    with manager(shared_path / "some" / "where", counter()) as checkpoints:
        assert checkpoints.restore() is None
        checkpoints.save()


def test_a_generation_in_place_of_the_directory(comm, shared_path):
    with manager(shared_path, counter()) as checkpoints:
        inside = checkpoints.save().path
    texts = ["is a generation", f"give {shared_path}", "restore(generation=1)"]
    for call in ("restore", "save"):
        with (
            manager(inside, counter()) as checkpoints,
            same_error(comm, OptionsError, *texts),
        ):
            getattr(checkpoints, call)()


def test_the_quarantine_in_place_of_the_directory(comm, shared_path):
    texts = [".quarantine holds generations", f"give {shared_path}"]
    for call in ("restore", "save"):
        with (
            manager(shared_path / ".quarantine", counter()) as checkpoints,
            same_error(comm, OptionsError, *texts),
        ):
            getattr(checkpoints, call)()


@pytest.mark.parametrize("name", ["model.pt", "__0_0.distcp", "last.ckpt"])
def test_the_directory_of_another_program(comm, shared_path, caplog, name):
    if comm.rank == 0:
        (shared_path / name).touch()
    with manager(shared_path, counter()) as checkpoints:
        with caplog.at_level(logging.WARNING):
            assert checkpoints.restore() is None
        told = [r.getMessage() for r in caplog.records if "another program" in r.message]
        assert len(told) == (comm.rank == 0)
        assert all(name in text and "is it the right directory?" in text for text in told)


def test_a_save_before_any_restore(comm, shared_path, caplog):
    with manager(shared_path, counter()) as checkpoints:
        checkpoints.save(step=500)
        checkpoints.save(step=600)  # its own generations are no other run's
    assert not [r for r in caplog.records if "restored nothing" in r.getMessage()]
    with manager(shared_path, counter()) as checkpoints:
        checkpoints.save(step=1)
        checkpoints.save(step=2)
    told = [r.getMessage() for r in caplog.records if "restored nothing" in r.getMessage()]
    assert len(told) == (comm.rank == 0)
    assert all("generation 2 of another run" in text for text in told)
    assert all("call manager.restore() before the training" in text for text in told)
    caplog.clear()
    with manager(shared_path, counter()) as checkpoints:
        checkpoints.restore()
        checkpoints.save(step=3)
    assert not [r for r in caplog.records if "restored nothing" in r.getMessage()]


def test_a_metric_that_no_save_has(comm, shared_path, caplog):
    retention = KeepBest("los", mode="min")
    with manager(shared_path, counter(), retention=retention) as checkpoints:
        for _ in range(3):
            checkpoints.save(metrics={"loss": 1.0})
    told = [r.getMessage() for r in caplog.records if "keeps nothing" in r.getMessage()]
    assert len(told) == (comm.rank == 0)
    assert all("'los'" in text and "metrics there: 'loss'" in text for text in told)


@pytest.mark.parametrize("records", [True, False])
def test_batches_that_nobody_records(comm, shared_path, caplog, records):
    sampler = ElasticSampler(40, 10)
    with manager(shared_path, sampler, interval=2) as checkpoints:
        for _ in sampler:
            if records:
                sampler.record_batch()
            checkpoints.step()
    told = [r.getMessage() for r in caplog.records if "no batch was" in r.getMessage()]
    assert len(told) == (comm.rank == 0 and not records)
    assert all("call record_batch() after each batch" in text for text in told)


def trained(kind):
    module = model()
    return TrainState(module=module, optimizer=kind(module.parameters(), lr=0.1))


MISFITS = {
    "an optimizer of another class": (
        lambda: trained(torch.optim.SGD),
        lambda: trained(torch.optim.Adam),
        ["optimizer SGD, the program has Adam", "restore the module alone first"],
    ),
    "an optimizer that was not saved": (
        lambda: TrainState(module=model()),
        lambda: trained(torch.optim.SGD),
        ["optimizer is in the program, not saved", "Options(strict=False)"],
    ),
    "a layer of another size": (
        lambda: TrainState(module=model()),
        lambda: TrainState(module=model(3)),
        ["weight F32[2, 2] is saved, the program has weight F32[2, 3]", "starts anew"],
    ),
    "another state": (
        lambda: TrainState(module=model()),
        lambda: ArrayState("field", {"x": np.ones(2)}),
        ["state 'field' is in the program, not saved", "Options(strict=False)"],
    ),
    "a dataset of another length": (
        lambda: ElasticSampler(10, 5),
        lambda: ElasticSampler(12, 5),
        ["length is saved as 10, the program has 12", "another directory"],
    ),
}


@pytest.mark.parametrize(("saved", "live", "texts"), MISFITS.values(), ids=[*MISFITS])
def test_a_program_that_has_changed(comm, shared_path, saved, live, texts):
    with manager(shared_path, saved()) as checkpoints:
        checkpoints.save()
    with manager(shared_path, live()) as checkpoints:
        nothing = "nothing was changed"
        with same_error(comm, StateMismatchError, nothing, *texts):
            checkpoints.restore()


def test_a_save_on_one_rank_alone(peers, shared_path):
    """``if rank == 0: manager.save()``, the mistake that everybody makes once."""
    checkpoints = manager(shared_path, counter())
    checkpoints._session.comm.deadline_seconds = 1
    with coming_late(peers, *range(1, peers.size)), pytest.raises(CollectiveError) as found:
        checkpoints.save()
    if peers.rank == 0:
        text = str(found.value)
        assert "rank 1 on " in text
        assert "every rank must call save(), never one alone (`if rank == 0:`)" in text
        assert "published generations are untouched" in text
    checkpoints.__exit__(None, found.value, None)
