# SPDX-License-Identifier: Apache-2.0
"""What an accumulator does on one rank alone; sums over ranks are in parallel."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.elastic.accumulator import Accumulator
from mpi_ckpt.errors import CheckpointError, RegistrationError, StateMismatchError
from tests.making import carry


def totals(accumulator: Accumulator) -> dict:
    """Return the sums as a save has them."""
    other = Accumulator()
    carry(accumulator, other)
    return dict(other._results)


def folded(*accumulators: Accumulator) -> Accumulator:
    """Do what a save does with the parts of several ranks."""
    root = accumulators[0]
    root.combine([sums.part() for sums in accumulators])
    for sums in accumulators:
        sums.combined()
    return root


def test_amounts_are_added_up_over_ranks_in_rank_order():
    ranks = [Accumulator({"n": 5}) for _ in range(3)]
    for rank, accumulator in enumerate(ranks, 1):
        accumulator["n"] += rank
        accumulator["loss"] -= rank / 2
        accumulator.update({"seen": 1}, other=2)
        accumulator.subtract(seen=3)
    assert totals(folded(*ranks)) == {"n": 11, "loss": -3.0, "seen": -6, "other": 6}


def test_amounts_are_counted_once():
    sums = Accumulator()
    sums["n"] += 1
    folded(sums)
    folded(sums)
    assert totals(sums) == {"n": 1}


def test_numbers_of_any_library_are_taken():
    sums = Accumulator()
    for value in (
        1,
        2.5,
        True,
        np.float32(0.5),
        np.array(3),
        torch.tensor(4),
        torch.ones((), requires_grad=True),
    ):
        sums["x"] += value
    assert totals(folded(sums)) == {"x": 13.0}


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i8", "u1"])
def test_arrays_are_added_and_saved_to_the_last_bit(dtype):
    array = np.array([[1, 0, 1]]).astype(dtype)
    sums = Accumulator()
    sums["x"] += array
    sums[7] += torch.arange(3)
    found = totals(folded(sums))
    assert found["x"].dtype == np.dtype(dtype)
    assert found["x"].tolist() == array.tolist()
    assert found[7].tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1, -0.0, 2**100])
def test_sums_of_any_value_are_saved_as_json_that_all_can_read(value):
    sums = Accumulator()
    sums["loss"] += value
    sums["all"] += np.array([1.0, value], np.float64) if value != 2**100 else 0
    folded(sums)
    json.dumps(sums.capture().structure, allow_nan=False)
    assert repr(totals(sums)["loss"]) == repr(0 + value)


def test_outside_it_reads_as_empty_and_takes_only_sums():
    sums = Accumulator({"n": 5})
    assert len(sums) == 0
    assert "n" not in sums
    assert list(sums) == []
    with pytest.raises(TypeError, match="only be added to"):
        sums["n"] = 3
    with pytest.raises(TypeError, match="only be added to"):
        sums["n"] = sums["m"]
    with pytest.raises(TypeError, match="only be read inside"):
        sums["n"] += sums["m"]
    with pytest.raises(KeyError):
        del sums["n"]
    assert totals(folded(sums)) == {"n": 5}


@pytest.mark.parametrize(
    "value",
    [
        *("text", None, [1], {}, np.array(["x"]), np.datetime64("2030-01-01")),
        # More than their numbers, which is lost in a sum.
        *(np.ma.masked_array([1.0], [True]), np.ones((1, 1)).view(np.matrix)),
    ],
    ids=lambda value: type(value).__name__,
)
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
    sums = Accumulator()
    sums["n"] += 1
    assert sums.part() == sums.part()
    assert sums.capture().structure == sums.capture().structure
    assert totals(folded(sums)) == {"n": 1}


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
        {"results": {}, "history": None},
        {"results": [], "history": None, "epoch": 0},
        {"results": {"~": "nothing known"}, "history": None, "epoch": 0},
    ],
)
def test_contents_of_another_state_are_a_mismatch(structure):
    with pytest.raises(StateMismatchError, match="not saved from an accumulator"):
        Accumulator().prepare(structure, [], strict=True)


ELEMENTS = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d", "g", "F", "D", "G"]


@given(st.data())
def test_sums_of_every_kind_of_number_come_back_as_they_were(data):
    sums, expected = Accumulator(), {}
    for key in range(data.draw(st.integers(1, 4))):
        dtype = np.dtype(data.draw(st.sampled_from(ELEMENTS)))
        shape = data.draw(st.sampled_from([(), (1,), (0,), (2, 3)]))
        value = np.full(shape, data.draw(st.integers(0, 1)), dtype) + dtype.type(1)
        if dtype.kind == "c":
            value = value * dtype.type(1j)
        for _ in range(data.draw(st.integers(1, 3))):
            sums[key] += value
            number = value if value.ndim else value.item()
            expected[key] = expected.get(key, 0) + number
    found = totals(folded(sums))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert type(found[key]) is type(value)
        assert np.asarray(found[key]).dtype == np.asarray(value).dtype
        assert np.array_equal(found[key], value)  # a long double has bytes of no meaning


@pytest.mark.parametrize("value", [np.longdouble(1) / 3, np.clongdouble(1j) / 3, 1 + 2j])
def test_wide_and_complex_numbers_keep_every_bit(value):
    sums = Accumulator()
    sums["x"] += value
    sums["y"] += np.array([value, value])
    found = totals(folded(sums))
    assert found["x"] == value
    assert found["y"].dtype == np.array([value]).dtype
    assert (found["y"] == value).all()


@pytest.mark.parametrize(
    ("dtype", "sums"),
    [
        (torch.bfloat16, np.float32),
        (torch.float8_e5m2, np.float32),
        (torch.complex64, np.complex64),
        (torch.float16, np.float16),
    ],
)
def test_tensors_that_numpy_has_no_kind_for_are_summed_exactly(dtype, sums):
    accumulator = Accumulator()
    for _ in range(300):  # in bfloat16 the sum would stand still at 256
        accumulator["x"] += torch.ones(3).to(dtype)
        accumulator["n"] += torch.tensor(1.0).to(dtype)
    found = totals(folded(accumulator))
    assert found["x"].dtype == sums
    assert found["x"].tolist() == [300] * 3
    assert found["n"] == 300


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "f2"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_sums_outgrow_the_narrow_type_of_their_arrays(kind, ranks):
    top = 2048 if kind == "f2" else np.iinfo(kind).max
    jobs = [Accumulator() for _ in range(ranks)]
    for one in jobs:
        one["x"] += np.array([top, 1], kind)
        one["x"] += torch.from_numpy(np.array([1, 1], kind))
        one["less"] -= np.array([1, 0], kind)
    found = totals(folded(*jobs))
    assert found["x"].tolist() == [(top + 1) * ranks, 2 * ranks]
    assert found["less"].tolist() == [-ranks, 0]
    found = totals(folded(jobs[0]))
    assert found["x"].tolist() == [(top + 1) * ranks, 2 * ranks]


def test_views_that_are_conjugated_when_read_are_taken():
    sums = Accumulator()
    sums["x"] += torch.tensor([1 + 2j]).conj()
    sums["y"] += torch.tensor([1 + 2j]).conj().imag
    found = totals(folded(sums))
    assert (found["x"].tolist(), found["y"].tolist()) == ([1 - 2j], [-2])


def test_numbers_of_ml_dtypes_are_taken():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    sums = Accumulator()
    sums["x"] += np.full(2, 1.5, ml_dtypes.bfloat16)
    sums["n"] += ml_dtypes.bfloat16(0.25)
    found = totals(folded(sums))
    assert (found["x"].dtype, found["x"].tolist()) == (np.float32, [1.5, 1.5])
    assert found["n"] == 0.25


def test_a_mapping_is_added_and_subtracted_as_a_whole():
    sums = Accumulator({"n": 1})
    sums += {"n": 2, "x": np.ones(2)}
    sums -= {"n": 1}
    assert isinstance(sums, Accumulator)
    found = totals(folded(sums))
    assert found["n"] == 2
    assert found["x"].tolist() == [1, 1]


def test_arrays_and_history_are_leaves():
    sums = Accumulator({"big": np.zeros(100_000), "n": 1})
    sums._history_epoch, sums._history = 3, [{"loss": n / 7} for n in range(400)]
    captured = sums.capture()
    assert sorted(leaf.spec.name for leaf in captured.leaves) == ["history", "results/big"]
    assert len(json.dumps(captured.structure)) < 1000
    other = Accumulator()
    carry(sums, other)
    assert (other._history_epoch, other._history) == (3, sums._history)


@pytest.mark.parametrize("make", [np.ones, torch.ones])
def test_what_was_put_in_is_not_changed_by_the_program(make):
    array = make(2)
    sums = Accumulator({"first": array})
    sums["added"] += array
    sums._open = sums._results
    sums["set"] = array
    sums._open = None
    array[:] = 7
    found = totals(folded(sums))
    assert {key: value.tolist() for key, value in found.items()} == {
        "first": [1, 1], "set": [1, 1], "added": [1, 1],
    }  # fmt: skip


def test_what_was_read_is_not_written_to_by_a_restore():
    sums, other = Accumulator({"x": np.ones(3)}), Accumulator({"x": np.zeros(3)})
    read = other._results["x"]
    carry(sums, other)
    assert read.tolist() == [0, 0, 0]
    assert other._results["x"].tolist() == [1, 1, 1]


def test_sums_of_the_first_form_are_read():
    array = {"array": "AQI=", "dtype": "|u1", "shape": [2]}
    structure = {
        "results": [["x", array], [3, {"float": "nan"}]],
        "history": [[None, [[["x", 1]]]], [4, [[["x", 2]], [["x", 3]]]], [3, []]],
    }
    sums = Accumulator()
    sums.prepare(structure, [], strict=True).adopt()
    assert sums._results["x"].tolist() == [1, 2]
    assert math.isnan(sums._results[3])
    assert (sums._history_epoch, sums._history) == (4, [{"x": 2}, {"x": 3}])


@pytest.mark.parametrize("initial", ["sums", ["n"], 3])
def test_what_is_no_dict_is_no_beginning(initial):
    with pytest.raises(RegistrationError, match="give a dict of sums"):
        Accumulator(initial)
