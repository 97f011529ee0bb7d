# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.engine.outline import Outline, StateOutline
from mpi_ckpt.engine.restore.matching import compare_names
from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.leaves.leaf import Form
from mpi_ckpt.state import State

A, B, C = (State(name) for name in "abc")
SAVED = tuple(StateOutline(name, None, Form(())) for name in "ab")


def compare(*wanted: State, **how) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare states of the program with a generation that has a and b."""
    outline = Outline(generation=7, step=0, size=1, states=SAVED)
    outline = outline.only([state.name for state in wanted])
    return compare_names(outline, wanted, **how)


def test_same_states_fit_in_any_order():
    assert compare(B, A, partial=False, strict=True) == ((), ())


def test_all_differences_are_told_at_once():
    with pytest.raises(StateMismatchError) as caught:
        compare(C, State("d"), A, partial=False, strict=True)
    assert caught.value.problems == (
        "state 'c' is in the program, not saved",
        "state 'd' is in the program, not saved",
        "state 'b' is saved, not in the program",
    )
    assert caught.value.generation == 7


def test_lenient_programs_restore_what_both_have():
    assert compare(C, A, partial=False, strict=False) == (("c",), ("b",))


def test_partial_restore_minds_no_others():
    assert compare(A, partial=True, strict=True) == ((), ())
    with pytest.raises(StateMismatchError, match="'c'"):
        compare(C, partial=True, strict=True)
    assert compare(C, partial=True, strict=False) == (("c",), ())
