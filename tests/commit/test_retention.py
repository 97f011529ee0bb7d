# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.errors import OptionsError
from mpi_ckpt.retention import (
    GenerationSummary,
    KeepBest,
    KeepEvery,
    KeepLast,
    RetentionPolicy,
    best_policies,
    select_kept,
)


def generations(*steps: int, losses=()) -> list[GenerationSummary]:
    losses = {n: {"loss": loss} for n, loss in enumerate(losses, 1)}
    return [
        GenerationSummary(n, step, losses.get(n, {})) for n, step in enumerate(steps, 1)
    ]


def test_newest_are_kept():
    assert KeepLast(2).keep(generations(10, 20, 30)) == {2, 3}
    assert KeepLast(5).keep(generations(10, 20, 30)) == {1, 2, 3}
    assert KeepLast(1).keep([]) == set()


def test_first_of_each_interval_is_kept():
    assert KeepEvery(100).keep(generations(0, 50, 99, 100, 150, 350, 399)) == {1, 4, 6}


def test_what_keep_every_kept_stays_kept_as_training_goes_on():
    policy, there = KeepEvery(10), generations(*range(0, 60, 3))
    kept = set()
    for count in range(1, len(there) + 1):
        left = [g for g in there[:count] if g.generation in kept or g is there[count - 1]]
        assert kept <= policy.keep(left)
        kept = policy.keep(left)
    assert kept == policy.keep(there)


def test_best_are_kept_in_either_direction():
    there = generations(1, 2, 3, 4, losses=[0.5, 0.1, 0.3, 0.2])
    assert KeepBest("loss", mode="min").keep(there) == {2}
    assert KeepBest("loss", 2, mode="min").keep(there) == {2, 4}
    assert KeepBest("loss", 2, mode="max").keep(there) == {1, 3}
    assert KeepBest("accuracy", mode="min").keep(there) == set()


def test_newer_of_two_equals_is_the_best():
    for mode in ("min", "max"):
        assert KeepBest("loss", mode=mode).keep(generations(1, 2, 3, losses=[1.0] * 3)) == {
            3
        }


def test_nan_and_missing_metrics_are_never_the_best():
    there = generations(1, 2, 3, 4, losses=[math.nan, math.inf, 0.0])
    assert KeepBest("loss", 4, mode="min").keep(there) == {2, 3}
    assert KeepBest("loss", mode="max").keep(there) == {2}


def test_joined_policies_keep_what_either_keeps():
    policy = KeepLast(1) | KeepEvery(100) | KeepBest("loss", mode="min")
    there = generations(0, 50, 100, 150, 160, losses=[9, 1, 5, 4, 3])
    assert policy.keep(there) == {1, 2, 3, 5}


class KeepNone(RetentionPolicy):
    def keep(self, generations):
        return set()


def test_newest_stays_whatever_the_policy_says():
    there = generations(1, 2, 3)
    assert select_kept(KeepNone(), there) == {3}
    assert select_kept(KeepNone(), []) == set()


@given(
    steps=st.lists(st.integers(-5, 500), max_size=20),
    policy=st.sampled_from([KeepLast(3), KeepEvery(50), KeepBest("loss", 2, mode="min")]),
)
def test_order_of_listing_does_not_matter(steps, policy):
    there = generations(*steps, losses=[s % 7 for s in steps])
    shuffled = random.Random(0).sample(there, len(there))
    assert select_kept(policy, shuffled) == select_kept(policy, there)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepLast(-1),
        lambda: KeepEvery(0),
        lambda: KeepBest("loss", 0, mode="min"),
        lambda: KeepBest("loss", mode="best"),
    ],
)
def test_policies_that_make_no_sense_are_refused(make):
    with pytest.raises(OptionsError):
        make()


def test_the_best_has_no_direction_of_its_own():
    with pytest.raises(TypeError, match="mode"):
        KeepBest("loss")
    with pytest.raises(OptionsError, match=r"metric='loss'.*mode='best'.*'min' or 'max'"):
        KeepBest("loss", mode="best")
    assert "mode='max'" in repr(KeepLast(1) | KeepBest("accuracy", mode="max"))


def test_policies_of_the_best_are_found_among_others():
    loss, accuracy = KeepBest("loss", mode="min"), KeepBest("accuracy", 2, mode="max")
    assert best_policies(KeepLast(1) | loss | KeepEvery(5) | accuracy) == [loss, accuracy]
    assert best_policies(KeepLast(1)) == []


def test_policies_show_what_they_are():
    # Ranks compare options by their text.
    assert repr(KeepLast(2) | KeepEvery(5)) == repr(KeepLast(2) | KeepEvery(5))
    assert repr(KeepLast(2) | KeepEvery(5)) != repr(KeepLast(2) | KeepEvery(6))
