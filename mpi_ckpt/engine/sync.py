# SPDX-License-Identifier: Apache-2.0
"""Making replicas equal: digests first, and only what differs is sent."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt import dtypes
from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import (
    agree,
    agree_on_root,
    bcast_json,
)
from mpi_ckpt.digest import Digest
from mpi_ckpt.engine.contents import Contents, capture_only, digest_contents
from mpi_ckpt.engine.differences import Difference, compare, compare_heads_first
from mpi_ckpt.engine.parts import combine_parts
from mpi_ckpt.engine.send import average_leaves, send_leaves
from mpi_ckpt.errors import DivergedError, StageError
from mpi_ckpt.leaf import Leaf, LeafSpec
from mpi_ckpt.reports import SyncReport
from mpi_ckpt.state import LeafState, State, Structure

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.options import Options

__all__ = ["capture_on_root", "sync_states"]


@without_collections
def sync_states(
    comm: Communicator,
    states: Sequence[State],
    options: Options,
    *,
    likely_equal: bool = True,
) -> tuple[list[Contents], SyncReport]:
    """Make all states equal on all ranks, in the way each asks for.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.
        options: Threads and window are used.
        likely_equal: Whether to digest all bytes at once, or first to look for leaves
            that need no digest, as they plainly differ. What comes of it is the same.

    Returns:
        The contents of the leaf states as root has them after the sync, in any order,
        and the report. On other ranks the contents may be older.

    Raises:
        DivergedError: On every rank, if a state that checks is not equal everywhere.
        StageError: On every rank, if a state cannot be captured on any.
        StateMismatchError: On every rank, if root's contents do not fit on one.
    """
    for state in states:
        if not isinstance(state, LeafState):
            agree(comm, f"sync() of state {state.name!r}", state.sync, error=StageError)
    leaf_states = [state for state in states if isinstance(state, LeafState)]
    combine_parts(comm, leaf_states)
    threads = options.digest_threads

    def capture() -> tuple[list[Contents], list[Contents]]:
        compared, rest = _capture(comm, leaf_states)
        return digest_contents(compared, threads) if likely_equal else compared, rest

    compared, rest = agree(comm, "capturing the states", capture, error=StageError)
    comparison = (
        compare(comm, compared)
        if likely_equal
        else compare_heads_first(comm, compared, threads)
    )
    compared, differences = comparison.contents, comparison.differences
    _refuse_divergence(compared, differences)
    differences = _prepare(comm, compared, differences)
    sent, averaged = _transfer(comm, compared, differences, options)
    _adopt(comm, differences)
    report = SyncReport(
        differing={
            compared[one.index].state.name: one.names(one.targets) for one in differences
        },
        bytes_hashed=comparison.bytes_hashed,
        bytes_sent=sent,
    )
    return [*(averaged.get(one.name, one) for one in compared), *rest], report


@without_collections
def capture_on_root(comm: Communicator, states: Sequence[State]) -> list[Contents]:
    """Take the leaf states as root has them, without comparing anything.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.

    Returns:
        Their contents on root, not yet digested; nothing elsewhere.

    Raises:
        StageError: On every rank, if a state cannot be captured on root.
    """
    leaf_states = [state for state in states if isinstance(state, LeafState)]
    # Parts differ by nature: without this, root would save those of an earlier save.
    combine_parts(comm, leaf_states)
    contents = agree_on_root(
        comm, "capturing the states", lambda: capture_only(leaf_states), error=StageError
    )
    return contents or []


def _capture(
    comm: Communicator, states: Sequence[LeafState]
) -> tuple[list[Contents], list[Contents]]:
    """Capture what is compared, and on root what is saved as it has it."""
    apart = [state for state in states if comm.size == 1 or state.sync_mode == "none"]
    names = {state.name for state in apart}
    compared = [state for state in states if state.name not in names]
    return capture_only(compared), capture_only(apart if comm.is_root else ())


def _refuse_divergence(
    contents: Sequence[Contents], differences: Sequence[Difference]
) -> None:
    problems = [
        f"state {contents[one.index].state.name!r}: "
        + ", ".join(one.names(contents[one.index].leaves))
        + " differ between ranks"
        for one in differences
        if contents[one.index].state.sync_mode == "check"
    ]
    # The differences were agreed on, so this is reached by all ranks or by none.
    if problems:
        raise DivergedError(
            "replicas have diverged, nothing was saved:\n  " + "\n  ".join(problems),
            problems=problems,
        )


def _prepare(
    comm: Communicator, contents: Sequence[Contents], differences: list[Difference]
) -> list[Difference]:
    if not differences:
        return []
    forms = _bcast_forms(comm, contents, [one.index for one in differences])

    def prepare() -> list[Difference]:
        prepared = []
        for difference, (structure, specs) in zip(differences, forms, strict=True):
            own = contents[difference.index]
            targets = own.leaves
            averaged = _averaged(own, difference)
            arrival = None
            if averaged or not comm.is_root:
                arrival = own.state.prepare(structure, specs, strict=True)
                targets = tuple([leaf for leaf in arrival.leaves if leaf is not None])
                if difference.leaves is not None:
                    sent = set() if comm.is_root else set(difference.leaves)
                    _keep_equal(own.leaves, targets, sent.difference(averaged))
            leaves = difference.leaves
            if leaves is None:
                leaves = tuple(range(len(specs)))
            prepared.append(
                replace(
                    difference,
                    leaves=leaves,
                    averaged=averaged,
                    arrival=arrival,
                    targets=targets,
                )
            )
        return prepared

    return agree(comm, "fitting root's states", prepare, error=StageError)


def _averaged(own: Contents, difference: Difference) -> tuple[int, ...]:
    if own.state.sync_mode != "mean" or difference.form:
        return ()
    specs = own.specs
    return tuple(i for i in difference.leaves or () if specs[i].dtype in dtypes.FLOATING)


def _bcast_forms(
    comm: Communicator, contents: Sequence[Contents], indices: Sequence[int]
) -> list[tuple[Structure, list[LeafSpec]]]:
    mine = [
        [contents[i].structure, [spec.to_json() for spec in contents[i].specs]]
        for i in indices
    ]
    forms = bcast_json(comm, mine, "sending the form of the states")
    return [
        (structure, [LeafSpec.from_json(spec) for spec in specs])
        for structure, specs in forms
    ]


def _keep_equal(
    leaves: Sequence[Leaf], targets: Sequence[Leaf], sent: Collection[int]
) -> None:
    """Fill targets that nothing is sent to from what this rank has: it is the same."""
    for index, (leaf, target) in enumerate(zip(leaves, targets, strict=True)):
        if index not in sent and not _same_memory(leaf, target):
            target.buffer.write(leaf.buffer.read())


def _same_memory(leaf: Leaf, target: Leaf) -> bool:
    one, other = leaf.buffer.view(), target.buffer.view()
    if one is None or other is None or not len(one):
        return False
    return bool(np.shares_memory(np.frombuffer(one, "u1"), np.frombuffer(other, "u1")))


def _transfer(
    comm: Communicator,
    contents: Sequence[Contents],
    differences: Sequence[Difference],
    options: Options,
) -> tuple[int, dict[str, Contents]]:
    sent = 0
    averaged: dict[str, Contents] = {}
    to_bcast: list[Leaf] = []
    for difference in differences:
        own = contents[difference.index]
        leaves = difference.leaves or ()
        to_bcast += [difference.targets[i] for i in leaves if i not in difference.averaged]
        if difference.averaged:
            average_leaves(comm, [difference.targets[i] for i in difference.averaged])
            averaged[own.state.name] = _with_new_digests(own, difference)
        sent += sum(difference.targets[i].spec.nbytes for i in leaves)
    send_leaves(comm, to_bcast, options.window_bytes)
    return sent, averaged


def _with_new_digests(own: Contents, difference: Difference) -> Contents:
    digests = list(own.digests or ())
    for index in difference.averaged:
        digests[index] = Digest.of(difference.targets[index].buffer.read())
    return replace(own, leaves=difference.targets, digests=tuple(digests))


def _adopt(comm: Communicator, differences: Sequence[Difference]) -> None:
    if not differences:
        return

    def adopt() -> None:
        for one in differences:
            if one.arrival is not None:
                one.arrival.adopt()

    agree(comm, "taking over root's states", adopt, error=StageError)
