# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.elastic.epochs import EpochState, remaining_epochs_until
from mpi_ckpt.elastic.sampler import ElasticSampler
from mpi_ckpt.errors import StateMismatchError
from tests.making import Ranks, carry


def test_loop_counts_and_knows_the_running_epoch():
    epochs = EpochState()
    seen = []
    for epoch in remaining_epochs_until(3, epochs):
        assert epochs.current == epoch == epochs.finished
        seen.append(epoch)
    assert seen == [0, 1, 2]
    assert (epochs.finished, epochs.current) == (3, None)
    assert list(remaining_epochs_until(3, epochs)) == []
    assert list(remaining_epochs_until(5, epochs)) == [3, 4]


def test_save_within_an_epoch_has_it_unfinished():
    saved, live = EpochState(), EpochState()
    for epoch in remaining_epochs_until(5, saved):
        if epoch == 2:
            carry(saved, live)
    assert list(remaining_epochs_until(5, live)) == [2, 3, 4]


def test_save_after_done_has_the_epoch_finished():
    saved, live = EpochState(), EpochState()
    for epoch in remaining_epochs_until(5, saved):
        saved.done()
        saved.done()  # counts once
        assert (saved.current, saved.finished) == (epoch, epoch + 1)
        if epoch == 2:
            carry(saved, live)
    assert saved.finished == 5
    assert list(remaining_epochs_until(5, live)) == [3, 4]


def test_there_is_no_epoch_to_end_outside_of_the_loop():
    epochs = EpochState()
    with pytest.raises(RuntimeError, match="no loop over 'epochs' is running"):
        epochs.done()
    list(remaining_epochs_until(1, epochs))
    with pytest.raises(RuntimeError, match="no epoch to end"):
        epochs.done()
    assert epochs.finished == 1


def beside(epochs):
    """Return a sampler that a manager would have beside these epochs."""
    sampler = ElasticSampler(10, 4)
    sampler.bind(Ranks())
    epochs.join({"epochs": epochs, "sampler": sampler})
    return sampler


def test_what_a_restart_runs_again_is_known():
    epochs = EpochState()
    sampler = beside(epochs)
    assert not epochs.is_repeatable
    for epoch in remaining_epochs_until(2, epochs):
        sampler.set_epoch(epoch)
        assert epochs.is_repeatable
        for _ in sampler:
            assert not epochs.is_repeatable  # goes on behind this batch
            sampler.record_batch()
        assert epochs.is_repeatable
        epochs.done()
        assert not epochs.is_repeatable
    assert not epochs.is_repeatable


def test_a_restore_says_that_an_epoch_is_about_to_be_repeated():
    epochs = EpochState()
    sampler = beside(epochs)
    assert epochs.restored() == ""
    for epoch in remaining_epochs_until(2, epochs):
        sampler.set_epoch(epoch)
        assert epochs.restored() == ""
        while sampler.remaining:
            sampler.record_batch()
        assert f"epoch {epoch} is about to be repeated" in epochs.restored()
        assert "'sampler'" in epochs.restored()
        assert "epochs.done()" in epochs.restored()
        epochs.done()
        assert epochs.restored() == ""


def test_save_between_loops_goes_on_after_them():
    saved, live = EpochState(), EpochState()
    list(remaining_epochs_until(2, saved))
    carry(saved, live)
    assert list(remaining_epochs_until(4, live)) == [2, 3]


def test_left_epoch_counts_as_finished():
    epochs = EpochState()
    for _ in remaining_epochs_until(5, epochs):
        break
    assert (epochs.finished, epochs.current) == (1, None)

    def fails():
        for _ in remaining_epochs_until(5, epochs):
            raise RuntimeError("in the body")

    with pytest.raises(RuntimeError, match="in the body"):
        fails()
    assert epochs.current is None
    assert next(remaining_epochs_until(5, epochs)) == 2


def test_loops_over_the_same_epochs_do_not_nest():
    epochs = EpochState()
    for _ in remaining_epochs_until(1, epochs):
        with pytest.raises(RuntimeError, match="running already"):
            next(remaining_epochs_until(3, epochs))
    assert epochs.finished == 1


@pytest.mark.parametrize(
    "structure", [None, [], {}, {"finished": -1}, {"finished": True}, {"finished": 1.0}]
)
def test_contents_of_another_state_are_a_mismatch(structure):
    with pytest.raises(StateMismatchError, match="not saved from epochs"):
        EpochState().prepare(structure, [], strict=True)
