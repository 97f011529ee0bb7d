# SPDX-License-Identifier: Apache-2.0
"""Finds how replicas differ, by digests; by first bytes where differences are likely."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import agree, differing_digests
from mpi_ckpt.engine.sync.captured import (
    CapturedState,
    digest_states,
    make_comparable,
    pick_leaves,
)
from mpi_ckpt.errors import StageError
from mpi_ckpt.leaves.digest import DIGEST_BYTES, digest_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaves.leaf import Leaf

STRUCTURE = "(structure)"
"""Stands in reports for what of a state is not a tensor."""

# Digesting smaller leaves is cheaper than a look ahead: half a megabyte takes 40 us.
_LARGE_BYTES = 512 << 10
_HEAD_BYTES = 4 << 10

_NOTHING = bytes(DIGEST_BYTES)

_DIGESTING = "digesting the states"
_DOING = "comparing the states of all ranks"


@dataclass(frozen=True, slots=True)
class StateDifference:
    """How one state differs between ranks.

    Attributes:
        index: Index of the state.
        form: Whether its structure or its leaves' specs differ.
        leaves: Indices of the leaves that differ; None for all of root's leaves.
    """

    index: int
    form: bool
    leaves: tuple[int, ...] | None

    def names(self, leaves: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of the difference for a report. Not collective.

        Args:
            leaves: Names of root's leaves.
        """
        if self.leaves is not None and len(self.leaves) < len(leaves):
            leaves = tuple([leaves[n] for n in self.leaves])
        return (STRUCTURE, *leaves) if self.form else leaves


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing states.

    Attributes:
        captured: The states; with fingerprints or digests, except those with leaves that
            differ in their first bytes.
        differences: An entry for each state that differs; the same on every rank.
        bytes_hashed: Bytes digested on this rank.
    """

    captured: list[CapturedState]
    differences: list[StateDifference]
    bytes_hashed: int


def compare(comm: Communicator, captured: list[CapturedState], threads: int) -> Comparison:
    """Compare states, after it is known that some differ.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        captured: States with fingerprints or digests, the same in the same order on every
            rank.
        threads: Threads that hash.

    Raises:
        StageError: On every rank, if any rank cannot read bytes.
        CollectiveError: On every live rank, if one never arrives.
    """
    differs = _compare_summaries(comm, captured)
    if differs[:, 3].any():
        # A rank has no fingerprint of a leaf of which others have one.
        plain = [replace(content, fingerprints=None) for content in captured]
        digest = partial(digest_states, plain, threads)
        captured = agree(comm, _DIGESTING, digest, error=StageError)
        differs = _compare_summaries(comm, captured)
    # Compare digests of single leaves where the leaves agree in name and form, but some
    # byte differs.
    inspected = [i for i, (specs, _, data, _) in enumerate(differs) if data and not specs]
    wholes = [captured[i].wholes for i in inspected]
    leaf_differs = differing_digests(comm, wholes, _DOING)
    ends = accumulate((len(captured[i].leaves) for i in inspected), initial=0)
    of_state = {
        index: tuple(np.flatnonzero(leaf_differs[first:last]).tolist())
        for index, (first, last) in zip(inspected, pairwise(ends), strict=True)
    }
    found = []
    for index, (specs, structure, *_) in enumerate(differs):
        leaves = None if specs else of_state.get(index, ())
        if specs or structure or leaves:
            found.append(StateDifference(index, bool(specs or structure), leaves))
    return Comparison(captured, found, sum(content.form.nbytes for content in captured))


def _compare_summaries(
    comm: Communicator, captured: Sequence[CapturedState]
) -> NDArray[np.bool_]:
    """Return for each state which of its four summaries differ between ranks."""
    summaries = [digest for content in captured for digest in content.summary()]
    return differing_digests(comm, summaries, _DOING).reshape(-1, 4)


def compare_heads_first(
    comm: Communicator, captured: Sequence[CapturedState], threads: int
) -> Comparison:
    """Compare states that are likely to differ, without digesting those that clearly do.

    Collective. Main thread only. Replicas that were made independently differ from the
    first bytes on: such a leaf is sent in any case, so it needs no digest. Leaves with
    equal first bytes are digested and compared as usual, with the same result.

    Args:
        comm: The communicator.
        captured: States without digests, the same in the same order on every rank.
        threads: Threads that hash.

    Raises:
        StageError: On every rank, if any rank cannot read bytes.
        CollectiveError: On every live rank, if one never arrives.
    """
    plain = _find_by_heads(comm, captured)
    others = [
        [n for n in range(len(content.leaves)) if n not in differ]
        if differ
        else range(len(content.leaves))
        for content, differ in zip(captured, plain, strict=True)
    ]

    def digest() -> list[CapturedState]:
        rests = [pick_leaves(*pair) for pair in zip(captured, others, strict=True)]
        return make_comparable(rests, threads)

    compared = compare(comm, agree(comm, _DIGESTING, digest, error=StageError), threads)
    rests = compared.captured
    by_digest = {difference.index: difference for difference in compared.differences}
    found = []
    for index, differ in enumerate(plain):
        difference = by_digest.get(index)
        if differ:
            difference = difference or StateDifference(index, form=False, leaves=())
            more = {others[index][n] for n in difference.leaves or ()}
            difference = replace(difference, leaves=tuple(sorted(differ | more)))
        if difference is not None:
            found.append(difference)
    whole = [
        content if differ else rest
        for content, rest, differ in zip(captured, rests, plain, strict=True)
    ]
    return Comparison(whole, found, compared.bytes_hashed)


def _find_by_heads(comm: Communicator, captured: Sequence[CapturedState]) -> list[set[int]]:
    """Return for each state the leaves whose first bytes differ between ranks."""
    forms = [digest_bytes(content.form.text) for content in captured]
    other_form = differing_digests(comm, forms, _DOING)
    large = [
        (index, number)
        for index, content in enumerate(captured)
        if content.state.sync_mode == "root" and not other_form[index]
        for number in np.flatnonzero(content.form.sizes >= _LARGE_BYTES).tolist()
    ]
    leaves = [captured[index].leaves[number] for index, number in large]
    heads = agree(comm, "looking at the states", lambda: _heads(leaves), error=StageError)
    # A leaf outside host memory on one rank is skipped on all.
    hidden = np.array([head is None for head in heads], np.uint8)
    hidden = comm.all_reduce(hidden, "max", _DOING)
    differs = differing_digests(comm, [head or _NOTHING for head in heads], _DOING)
    found: list[set[int]] = [set() for _ in captured]
    for place in np.flatnonzero(differs & (hidden == 0)):
        index, number = large[place]
        found[index].add(number)
    return found


def _heads(leaves: Sequence[Leaf]) -> list[bytes | None]:
    views = [leaf.buffer.view() for leaf in leaves]
    return [None if view is None else digest_bytes(view[:_HEAD_BYTES]) for view in views]
