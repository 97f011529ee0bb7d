# SPDX-License-Identifier: Apache-2.0
"""The serial contract: what a manager of one rank does, with every mode of saving."""

from __future__ import annotations

import logging
import math
import os

import numpy as np
import pytest

import mpi_ckpt
from mpi_ckpt import EpochState, remaining_epochs_until
from mpi_ckpt.elastic import accumulator
from mpi_ckpt.errors import (
    CorruptGenerationError,
    LockedError,
    RegistrationError,
    SaveError,
    StateMismatchError,
)
from mpi_ckpt.options import IO
from mpi_ckpt.storage.owning import lock


def arrays(**given) -> mpi_ckpt.ArrayState:
    return mpi_ckpt.ArrayState("arrays", {"x": np.arange(5.0), **given})


@pytest.fixture(
    params=[{}, {"io": IO(reuse=False)}, {"asynchronous": True}, {"io": IO(mode="direct")}],
    ids=str,
)
def modes(request):
    """Every way of saving must give the same generations."""
    return request.param


def test_save_and_restore_agree_in_every_mode(manage, modes):
    state = arrays()
    plain = mpi_ckpt.ObjectState("object", {"n": 1})
    manager = manage(state, plain, **modes)
    for turn in range(5):
        state.arrays["x"] += 1
        plain.value = {"n": turn}
        report = manager.save(turn, metrics={"loss": turn}).wait()
        assert (report.generation, report.step, report.size) == (turn + 1, turn, 1)
        state.arrays["x"] *= 1  # a change of nothing
    wanted = state.arrays["x"].copy()
    manager.close()
    live = arrays()
    other = mpi_ckpt.ObjectState("object")
    report = manage(live, other, **modes).restore()
    assert (report.generation, report.step, report.metrics) == (5, 4, {"loss": 4.0})
    assert live.arrays["x"].tolist() == wanted.tolist()
    assert other.value == {"n": 4}


def test_asynchronous_save_takes_the_state_of_its_moment(manage):
    state = arrays()
    manager = manage(state, asynchronous=True)
    pending = manager.save(1)
    assert isinstance(pending, mpi_ckpt.PendingSave)
    state.arrays["x"][:] = -1
    assert pending.wait() is pending.wait()
    assert pending.done()
    manager.restore()
    assert state.arrays["x"].tolist() == [0, 1, 2, 3, 4]


def test_retention_is_applied_and_listed(manage):
    manager = manage(
        arrays(), retention=mpi_ckpt.KeepLast(1) | mpi_ckpt.KeepBest("loss", mode="min")
    )
    pruned = [manager.save(n, metrics={"loss": abs(n - 2)}).pruned for n in range(5)]
    assert pruned == [(), (1,), (2,), (), (4,)]
    assert [info.generation for info in manager.generations()] == [3, 5]


def test_nothing_saved_is_nothing_restored(manage, tmp_path):
    state = arrays()
    assert manage(state).restore() is None
    assert state.arrays["x"].tolist() == [0, 1, 2, 3, 4]


def test_random_streams_are_those_of_the_save_also_without_sync(manage):
    manager = manage(mpi_ckpt.RNGState())
    manager.save()
    np.random.rand(5)
    manager.save(sync=False)
    expected = np.random.rand(3)
    manager.restore()
    assert np.random.rand(3).tolist() == expected.tolist()


def test_sums_that_are_no_numbers_any_more_are_saved_and_restored(manage):
    sums = mpi_ckpt.Accumulator()
    manager = manage(sums)
    sums["loss"] += math.nan
    sums["array"] += np.array([1.0, math.inf])
    manager.save()
    manager.restore()
    with sums.synchronized():
        assert math.isnan(sums["loss"])
        assert sums["array"].tolist() == [1.0, math.inf]


def test_sums_nest_and_need_not_be_replayed(manage):
    sums = mpi_ckpt.Accumulator()
    manager = manage(sums)
    sums["n"] += 1
    with sums.synchronized(), sums.synchronized() as inner:
        inner["n"] *= 10
        assert (sums["n"], len(sums), "n" in sums, list(sums)) == (10, 1, True, ["n"])
    assert len(sums) == 0
    for expected in (11, 12):
        sums["n"] += 1
        with sums.synchronized(replayed=False):
            assert sums["n"] == expected
    manager.save()
    manager.restore()
    sums["n"] += 1
    with sums.synchronized(replayed=False):
        assert sums["n"] == 13


def test_sums_are_replayed_once_after_a_restart(manage, caplog):
    def run(told, manager, epochs, sums, *, save):
        for _ in remaining_epochs_until(1, epochs):
            for number in range(3):
                sums["n"] += 3
                with sums.synchronized():
                    told.append(sums["n"])
                if number == save:
                    manager.save()
                    return

    told, again = [], []
    epochs = EpochState()
    with manage(epochs, sums := mpi_ckpt.Accumulator(epochs=epochs)) as manager:
        run(told, manager, epochs, sums, save=1)
    epochs = EpochState()
    manager = manage(epochs, sums := mpi_ckpt.Accumulator(epochs=epochs))
    manager.restore()
    run(again, manager, epochs, sums, save=None)
    assert (told, again) == ([3, 6], [3, 6, 9])
    (record,) = caplog.records  # once, though two blocks were
    assert "epoch 0 is run again" in record.getMessage()


def test_sums_in_a_loop_over_steps_are_never_replayed(manage):
    for start in (0, 20, 40):
        manager = manage(sums := mpi_ckpt.Accumulator())
        manager.restore()
        for step in range(start + 1, start + 21):
            sums["n"] += 1
            if step % 5 == 0:
                with sums.synchronized():
                    assert sums["n"] == step
        manager.save()
        assert sums._history == []
        manager.close()


def test_results_that_are_remembered_have_a_bound(manage, monkeypatch, caplog):
    monkeypatch.setattr(accumulator, "_REMEMBERED_MAX", 10)
    epochs = EpochState()
    manage(epochs, sums := mpi_ckpt.Accumulator(epochs=epochs))
    for epoch in remaining_epochs_until(2, epochs):
        for _ in range(10 + 3 * epoch):
            with sums.synchronized():
                pass
        assert sums._history is None if epoch else len(sums._history) == 10
    (record,) = caplog.records
    assert "more than 10 times in epoch 1" in record.getMessage()


@pytest.mark.parametrize("step", [1.5, "7", 2**63])
def test_step_that_is_no_integer_is_not_saved(manage, step):
    manager = manage(arrays())
    with pytest.raises(SaveError):
        manager.save(step).wait()
    assert manager.generations() == []
    assert manager.save(np.int64(5)).step == 5


def test_mismatch_keeps_every_finding_on_its_way_to_the_user(manage):
    with manage(arrays()) as manager:
        manager.save()
    live = mpi_ckpt.ArrayState("arrays", {"x": np.zeros(4), "y": np.zeros(1)})
    with pytest.raises(StateMismatchError) as caught:
        manage(live).restore()
    assert len(caught.value.problems) == 2
    assert caught.value.generation == 1
    assert not live.arrays["x"].any()


def test_bad_newest_is_set_aside_and_told_once(manage, tmp_path, caplog):
    state = arrays()
    with manage(state, io=IO(reuse=False)) as manager:
        manager.save(1)
        state.arrays["x"] += 1
        bad = manager.save(2).path
    with (bad / "rank-00000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    report = manage(state).restore()
    assert (report.generation, report.step) == (1, 1)
    assert list(report.quarantined) == [str(bad)]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert state.arrays["x"].tolist() == [0, 1, 2, 3, 4]


def test_partial_restores_take_one_generation(manage):
    first, other = (mpi_ckpt.ObjectState(name, 1) for name in ("one", "other"))
    manager = manage(first, other)
    manager.save()
    assert manager.restore(only=["one"]).generation == 1
    assert manager.restore(only=["other"]).missing == ()
    with pytest.raises(RegistrationError, match="no states"):
        manager.restore(only=["third"])


def test_second_job_is_refused_before_it_computes_for_hours(manage, monkeypatch):
    monkeypatch.setattr(lock.DirectoryLock.__init__, "__defaults__", (0.0,))
    manage(arrays()).save()
    with pytest.raises(LockedError, match="another running job"):
        manage(arrays()).save()
    with pytest.raises(LockedError):
        manage(arrays()).restore()


def test_step_saves_when_due_and_never_else(manage):
    manager = manage(arrays(), interval=3)
    assert [manager.step() for _ in range(7)] == [False] * 7
    assert [info.step for info in manager.generations()] == [3, 6]
    assert (manager.steps, manager.exit_code) == (7, 0)
    manager.restore()
    assert manager.steps == 6


def test_damaged_generations_only_are_an_error(manage):
    with manage(arrays()) as manager:
        (manager.save().path / "manifest.json").write_bytes(b"{}")
    with pytest.raises(CorruptGenerationError, match="no generation"):
        manage(arrays()).restore()
