# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.engine.find import Fit, Found, fit_states
from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.state import State

FOUND = Found({"generation": 7, "states": {"a": {}, "b": {}}}, None)
A, B, C = (State(name) for name in "abc")


def test_same_states_fit_in_the_programs_order():
    assert fit_states(FOUND, [B, A], partial=False, strict=True) == Fit((B, A), (), ())


def test_all_differences_are_told_at_once():
    with pytest.raises(StateMismatchError) as caught:
        fit_states(FOUND, [C, State("d"), A], partial=False, strict=True)
    assert caught.value.problems == (
        "state 'c' is in the program, not saved",
        "state 'd' is in the program, not saved",
        "state 'b' is saved, not in the program",
    )
    assert caught.value.generation == 7


def test_lenient_programs_restore_what_both_have():
    assert fit_states(FOUND, [C, A], partial=False, strict=False) == Fit(
        (A,), ("c",), ("b",)
    )


def test_partial_restore_minds_no_others():
    assert fit_states(FOUND, [A], partial=True, strict=True) == Fit((A,), (), ())
    with pytest.raises(StateMismatchError, match="'c'"):
        fit_states(FOUND, [C], partial=True, strict=True)
    assert fit_states(FOUND, [C], partial=True, strict=False).missing == ("c",)
