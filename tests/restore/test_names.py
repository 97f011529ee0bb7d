# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from mpi_ckpt.engine.registry import _differ_in_numbers, numbered_alike


def test_texts_that_differ_in_numbers_only():
    assert _differ_in_numbers("cache-1", "cache-10")
    assert _differ_in_numbers("r0/of4", "r3/of4")
    assert not _differ_in_numbers("cache-1", "cache-1")
    assert not _differ_in_numbers("cache-1", "cash-1")
    assert not _differ_in_numbers("cache", "cache-1")


def test_names_are_paired_with_those_they_stand_for():
    assert numbered_alike(["a-4", "b"], ["b", "a-3", "c-4"]) == [("a-4", "a-3"), ("b", "b")]
    assert numbered_alike(["a"], []) == []
    assert numbered_alike([], ["a-1"]) == []
