# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.states.mismatch import compare_specs, raise_mismatch

A, B, C = (LeafSpec(name, "F32", (2,)) for name in "abc")


def test_same_leaves_in_any_order_fit():
    compare_specs("s", [A, B, C], [C, A, B])
    compare_specs("s", [], [])


@pytest.mark.parametrize(
    ("live", "told"),
    [
        ([A], "b F32[2] is saved, the program has no such leaf"),
        ([A, B, C], "c F32[2] is in the program, not in the checkpoint"),
        ([A, LeafSpec("b", "F64", (2,))], "the program has b F64[2]"),
        ([A, LeafSpec("b", "F32", (2, 1))], "the program has b F32[2, 1]"),
    ],
)
def test_each_difference_is_told(live, told):
    with pytest.raises(StateMismatchError) as caught:
        compare_specs("s", [A, B], live)
    assert caught.value.problems == (next(p for p in caught.value.problems if told in p),)
    assert told in str(caught.value)


def test_all_differences_are_told_at_once():
    with pytest.raises(StateMismatchError) as caught:
        compare_specs("s", [A, B], [LeafSpec("a", "I8", ()), C])
    assert [problem[:4] for problem in caught.value.problems] == ["s: b", "s: a", "s: c"]


def test_no_problem_is_no_error():
    raise_mismatch("s", [])
