# SPDX-License-Identifier: Apache-2.0
"""What an accumulator does on one rank alone; sums over ranks are in parallel."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mpi_ckpt.elastic.accumulator import Accumulator
from mpi_ckpt.errors import CheckpointError, StateMismatchError
from tests.making import carry


def totals(accumulator: Accumulator) -> dict:
    """Return the sums as a save has them."""
    other = Accumulator()
    carry(accumulator, other)
    return dict(other._results)


def folded(*accumulators: Accumulator) -> Accumulator:
    """Do what a save does with the parts of several ranks."""
    root = accumulators[0]
    root.combine([one.part() for one in accumulators])
    for one in accumulators:
        one.combined()
    return root


def test_amounts_are_added_up_over_ranks_in_rank_order():
    ranks = [Accumulator({"n": 5}) for _ in range(3)]
    for rank, one in enumerate(ranks, 1):
        one["n"] += rank
        one["loss"] -= rank / 2
        one.update({"seen": 1}, other=2)
        one.subtract(seen=3)
    assert totals(folded(*ranks)) == {"n": 11, "loss": -3.0, "seen": -6, "other": 6}


def test_amounts_are_counted_once():
    one = Accumulator()
    one["n"] += 1
    folded(one)
    folded(one)
    assert totals(one) == {"n": 1}


def test_numbers_of_any_library_are_taken():
    one = Accumulator()
    for value in (
        1,
        2.5,
        True,
        np.float32(0.5),
        np.array(3),
        torch.tensor(4),
        torch.ones((), requires_grad=True),
    ):
        one["x"] += value
    assert totals(folded(one)) == {"x": 13.0}


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i8", "u1"])
def test_arrays_are_added_and_saved_to_the_last_bit(dtype):
    array = np.array([[1, 0, 1]]).astype(dtype)
    one = Accumulator()
    one["x"] += array
    one[7] += torch.arange(3)
    found = totals(folded(one))
    assert found["x"].dtype == np.dtype(dtype)
    assert found["x"].tolist() == array.tolist()
    assert found[7].tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1, -0.0, 2**100])
def test_sums_of_any_value_are_saved_as_json_that_all_can_read(value):
    one = Accumulator()
    one["loss"] += value
    one["all"] += np.array([1.0, value], np.float64) if value != 2**100 else 0
    folded(one)
    json.dumps(one.capture().structure, allow_nan=False)
    assert repr(totals(one)["loss"]) == repr(0 + value)


def test_outside_it_reads_as_empty_and_takes_only_sums():
    one = Accumulator({"n": 5})
    assert len(one) == 0
    assert "n" not in one
    assert list(one) == []
    with pytest.raises(TypeError, match="only be added to"):
        one["n"] = 3
    with pytest.raises(TypeError, match="only be added to"):
        one["n"] = one["m"]
    with pytest.raises(TypeError, match="only be read inside"):
        one["n"] += one["m"]
    with pytest.raises(KeyError):
        del one["n"]
    assert totals(folded(one)) == {"n": 5}


@pytest.mark.parametrize("value", ["text", None, [1], {}, np.array(["x"]), np.array([1j])])
def test_what_is_no_number_is_refused_naming_the_key(value):
    with pytest.raises(TypeError, match="'n'"):
        Accumulator()["n"] += value


@pytest.mark.parametrize("key", [(1, 2), None, 1.5, b"x"])
def test_keys_are_text_or_integers(key):
    with pytest.raises(TypeError, match="text or integers"):
        Accumulator()[key] += 1


def test_sums_belong_to_a_manager():
    with (
        pytest.raises(CheckpointError, match="belongs to no manager"),
        Accumulator().synchronized(),
    ):
        pytest.fail("entered")


def test_restored_sums_replace_and_pending_amounts_are_dropped():
    saved = Accumulator()
    saved["n"] += 3
    folded(saved)
    live = Accumulator({"other": 1})
    live["n"] += 100
    carry(saved, live)
    assert totals(folded(live)) == {"n": 3}


def test_capture_and_part_change_nothing():
    one = Accumulator()
    one["n"] += 1
    assert one.part() == one.part()
    assert one.capture().structure == one.capture().structure
    assert totals(folded(one)) == {"n": 1}


@pytest.mark.parametrize(
    "structure",
    [
        None,
        [],
        {},
        {"results": 5, "history": []},
        {"results": []},
        {"results": [[1]], "history": []},
        {"results": [["x", {"array": "", "dtype": "O", "shape": [1]}]], "history": []},
    ],
)
def test_contents_of_another_state_are_a_mismatch(structure):
    with pytest.raises(StateMismatchError, match="not saved from an accumulator"):
        Accumulator().prepare(structure, [], strict=True)
