# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.engine.save.reuse import KnownLeaves, plan_reuse, sample
from mpi_ckpt.engine.sync.captured import Fingerprints, capture_states, digest_states
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.storage.reading.reader import read_manifest
from tests.making import Stream, publish

if TYPE_CHECKING:
    from mpi_ckpt.engine.save.reuse import SharedLeaves
    from mpi_ckpt.storage.format.manifest import Manifest

SHARD = "rank-00000.safetensors"


def arrays(**changed) -> dict:
    return {"a": np.arange(8.0), "b": np.ones(8), "c": np.zeros(4), **changed}


def plan(older: Manifest, given: dict, *, name: str = "s", **named):
    contents = digest_states(capture_states([ArrayState(name, given)]), 1)
    named = {"generation": 2, "full_every": 10, **named}
    return plan_reuse(older, contents, **named)


def shared(reuse: SharedLeaves) -> set[tuple[int, int]]:
    """Return the indices of states and leaves that are shared."""
    assert reuse.numbers.keys() == reuse.leaves.keys()
    return {(state, n) for state, found in reuse.numbers.items() for n in found.tolist()}


@pytest.fixture
def older(tmp_path) -> Manifest:
    return read_manifest(
        publish(tmp_path, [ArrayState("s", arrays()), Stream("t", b"text")])
    )


def test_unchanged_leaves_are_found_where_they_were(older):
    reuse = plan(older, arrays(c=np.ones(4)))
    assert shared(reuse) == {(0, 0), (0, 1)}
    stored = {leaf.spec.name: leaf for leaf in older.state("s").leaves}
    assert list(reuse.leaves[0]) == [stored["a"], stored["b"]]
    assert set(reuse.files) == {SHARD}
    assert reuse.states == ()


@pytest.mark.parametrize(
    "changed",
    [
        {"a": np.arange(8.0) + 1},
        {"a": np.arange(8.0).view(np.int64)},
        {"a": np.arange(8.0).reshape(2, 4)},
        {"a": np.arange(9.0)},
    ],
)
def test_leaf_that_differs_in_anything_is_written_again(older, changed):
    assert shared(plan(older, arrays(**changed))) == {(0, 1), (0, 2)}


def test_leaf_of_another_name_or_state_is_written_again(older):
    given = arrays()
    given["z"] = given.pop("a")
    assert shared(plan(older, given)) == {(0, 0), (0, 1)}
    assert plan(older, arrays(), name="other").leaves == {}
    assert plan(older, arrays(), name="t").leaves == {}


def fingerprinted(prints: bytes, places=b"\1\1\1", **changed):
    """Return contents without digests; a byte stands for the fingerprint of each leaf."""
    (content,) = capture_states([ArrayState("s", arrays(**changed))])
    wholes = b"".join(bytes([one]) * 16 for one in prints)
    return replace(content, fingerprints=Fingerprints(wholes, places))


def test_leaves_that_keep_their_fingerprint_are_shared(older):
    known = KnownLeaves.of(older.generation, [fingerprinted(b"abc")])
    limits = {"generation": 2, "full_every": 10, "known": known}
    reuse = plan_reuse(older, [fingerprinted(b"abx")], **limits)
    assert shared(reuse) == {(0, 0), (0, 1)}
    stored = {leaf.spec.name: leaf for leaf in older.state("s").leaves}
    assert list(reuse.leaves[0]) == [stored["a"], stored["b"]]
    assert plan_reuse(older, [fingerprinted(b"xyz")], **limits).files == {}


@pytest.mark.parametrize(
    ("generation", "content"),
    [
        (2, {}),  # an older generation has become the newest
        (1, {"places": b"\1\1\0"}),  # a leaf was on the host then
        (1, {"a": np.arange(8)}),
        (1, {"d": np.zeros(1), "prints": b"abcd", "places": b"\1\1\1\1"}),
    ],
)
def test_fingerprints_of_something_else_say_nothing(older, generation, content):
    known = KnownLeaves.of(generation, [fingerprinted(b"abc")])
    now = fingerprinted(**{"prints": b"abc", **content})
    assert known.unchanged(older, now) is None
    limits = {"generation": 2, "full_every": 10, "known": known}
    assert plan_reuse(older, [now], **limits).leaves == {}


def test_undigested_contents_are_not_looked_at(older):
    contents = capture_states([ArrayState("s", arrays())])
    assert plan_reuse(older, contents, generation=2, full_every=10).leaves == {}


def test_file_mostly_out_of_use_is_not_shared_any_further(older):
    assert plan(older, {"a": np.arange(8.0), "b": np.zeros(8)}).leaves == {}
    assert plan(older, arrays(b=np.zeros(8))).files.keys() == {SHARD}


@pytest.mark.parametrize(
    ("generation", "is_shared"), [(2, True), (10, True), (11, False), (99, False)]
)
def test_everything_is_written_anew_so_often(older, generation, is_shared):
    assert bool(plan(older, arrays(), generation=generation).leaves) == is_shared
    assert plan(older, arrays(), full_every=1).leaves == {}


def test_carried_states_come_whatever_it_costs(older):
    carried = [older.state("t"), older.state("s")]
    reuse = plan_reuse(older, (), generation=99, full_every=1, carried=carried)
    assert reuse.states == tuple(carried)
    assert set(reuse.files) == {SHARD, "t.bin"}


def test_refused_files_give_their_leaves_back(older):
    reuse = plan(older, arrays()).without_files({SHARD})
    assert (reuse.leaves, reuse.files) == ({}, {})


def test_files_are_renamed_wherever_they_are_named(older):
    reuse = plan_reuse(
        older,
        digest_states(capture_states([ArrayState("s", arrays())]), 1),
        generation=2,
        full_every=10,
        carried=[older.state("t"), replace(older.state("s"), name="u")],
    )
    moved = reuse.renamed(lambda name, generation: f"{generation}-{name}")
    assert set(moved.files) == {f"1-{SHARD}", "1-t.bin"}
    assert all(name == file.name for name, file in moved.files.items())
    named = [leaf.extent.file for found in moved.leaves.values() for leaf in found]
    named += [leaf.extent.file for state in moved.states for leaf in state.leaves]
    assert set(named) == set(moved.files)
    assert len(named) == 3 + 1 + 3


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=4),
    st.integers(1, 9),
    st.data(),
)
def test_sample_misses_no_run_of_more_than_its_share(sizes, count, data):
    states = [
        ArrayState(f"s{i}", {f"a{n}": np.zeros(m, "u1") for n, m in enumerate(size)})
        for i, size in enumerate(sizes)
    ]
    contents = capture_states(states)
    picked = {
        (content.name, leaf.spec.name)
        for content in sample(contents, count)
        for leaf in content.leaves
    }
    assert len(picked) <= count
    every = [
        ((content.name, spec.name), spec.nbytes)
        for content in contents
        for spec in content.specs
    ]
    first = data.draw(st.integers(0, len(every)))
    run = every[first : data.draw(st.integers(first, len(every)))]
    if sum(nbytes for _, nbytes in run) > sum(nbytes for _, nbytes in every) / count:
        assert picked & {key for key, _ in run}
