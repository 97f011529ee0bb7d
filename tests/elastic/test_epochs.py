# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.elastic.epochs import EpochState, remaining_epochs_until
from mpi_ckpt.errors import StateMismatchError
from tests.making import carry


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
