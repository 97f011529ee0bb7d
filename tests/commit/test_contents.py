# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpi_ckpt.engine.sync.captured import Fingerprints, capture_states, digest_states
from mpi_ckpt.errors import StageError
from mpi_ckpt.leaves.digest import Digest
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.states.nested import ObjectState


def state(**changed) -> ArrayState:
    arrays = {"a": np.arange(4.0), "b": np.arange(6, dtype="i2").reshape(2, 3)}
    return ArrayState("s", {**arrays, **changed})


@pytest.mark.parametrize("threads", [1, 3])
def test_every_leaf_has_its_own_digest(threads):
    states = [state(), ObjectState("o", {"x": np.ones(2), "y": 1}), state()]
    contents = digest_states(capture_states(states), threads)
    assert [content.state for content in contents] == states
    for content in contents:
        assert len(content.digests) == len(content.leaves)
        for leaf, digest in zip(content.leaves, content.digests, strict=True):
            assert digest == Digest.of(leaf.buffer.read())
    assert contents[1].structure["y"] == 1


def changed_summaries(other: ArrayState | ObjectState, content=None) -> list[bool]:
    """Tell which of the four digests (forms, structure, bytes, kinds) differ."""
    first, second = digest_states(capture_states([content or state(), other]), 1)
    return [a != b for a, b in zip(first.summary(), second.summary(), strict=True)]


def test_summary_tells_what_kind_of_difference_there_is():
    assert changed_summaries(state()) == [False, False, False, False]
    assert changed_summaries(state(a=np.arange(4.0) + 1)) == [False, False, True, False]
    assert changed_summaries(state(b=np.arange(6, dtype="i2"))) == [
        True,
        False,
        False,
        False,
    ]
    assert changed_summaries(state(a=np.arange(4.0).view("i8"))) == [
        True,
        False,
        False,
        False,
    ]
    assert changed_summaries(state(c=np.ones(1))) == [True, False, True, False]
    first, other = (ObjectState("o", {"n": n, "x": np.ones(2)}) for n in (1, 2))
    assert changed_summaries(other, first) == [False, True, False, False]


def test_summary_tells_of_which_leaves_there_are_fingerprints():
    (content,) = digest_states(capture_states([state()]), 1)
    some, others = (
        replace(content, fingerprints=Fingerprints(content.digests.wholes, places))
        for places in (b"\0\1", b"\1\0")
    )
    assert len({one.summary()[3] for one in (content, some, others)}) == 3
    assert len({one.summary()[:3] for one in (content, some, others)}) == 1


def test_nothing_is_copied():
    live = state()
    (contents,) = digest_states(capture_states([live]), 1)
    live.arrays["a"][0] = 7
    assert bytes(contents.leaves[0].buffer.read()) == live.arrays["a"].tobytes()


def test_what_was_digested_is_not_digested_again():
    captured = capture_states([state(), state(a=np.ones(2))])
    assert [content.digests for content in captured] == [None, None]
    mixed = [*digest_states(capture_states([state()]), 1), captured[1]]
    digested = digest_states(mixed, 1)
    assert digested[0] is mixed[0]
    assert (
        digested[1].digests
        == digest_states(capture_states([state(a=np.ones(2))]), 1)[0].digests
    )


def test_state_that_cannot_be_captured_is_told():
    with pytest.raises(StageError, match="object"):
        digest_states(capture_states([ObjectState("o", {"x": object()})]), 1)
    assert digest_states(capture_states([]), 2) == []
