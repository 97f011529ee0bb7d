# SPDX-License-Identifier: Apache-2.0
"""Making replicas equal: digests first, and only what differs is sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt import dtypes
from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree, meet, on_root
from mpi_ckpt.digest import Digest
from mpi_ckpt.engine.sync.captured import (
    CapturedState,
    capture_states,
    digest_of,
    digest_states,
)
from mpi_ckpt.engine.sync.comparing import (
    Comparison,
    StateDifference,
    compare,
    compare_heads_first,
)
from mpi_ckpt.engine.sync.parts import combine_parts
from mpi_ckpt.engine.sync.sending import average_leaves, send_leaves
from mpi_ckpt.errors import DivergedError, StageError
from mpi_ckpt.leaf import LeafSpec
from mpi_ckpt.reports import SyncReport
from mpi_ckpt.state import LeafState, State, Structure

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaf import Leaf
    from mpi_ckpt.options import Options
    from mpi_ckpt.state import Arrival

__all__ = ["capture_on_root", "sync_states"]

_CAPTURING = "capturing the states"


@without_collections()
def sync_states(
    comm: Communicator,
    states: Sequence[State],
    options: Options,
    *,
    parts: bytes | None = None,
    likely_equal: bool = True,
) -> tuple[list[CapturedState], SyncReport]:
    """Make states equal on all ranks, in the way each asks for.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.
        options: Threads and window are used.
        parts: What `take_parts` returned on this rank; None to take them now.
        likely_equal: Whether to digest all bytes at once, or first to look for leaves
            that need no digest, as they plainly differ. What comes of it is the same.

    Returns:
        The contents of the leaf states as root has them after the sync, in any order,
        and the report. On other ranks the contents may be older.

    Raises:
        DivergedError: On every rank, if a state that checks is not equal everywhere.
        StageError: On every rank, if a state cannot be synced or captured on any.
        StateMismatchError: On every rank, if root's contents do not fit on one.
    """
    for state in states:
        if not isinstance(state, LeafState):
            agree(comm, f"sync() of state {state.name!r}", state.sync, error=StageError)
    combine_parts(comm, states, parts)
    leaf_states = [state for state in states if isinstance(state, LeafState)]
    comparison, apart = _compare(comm, leaf_states, options, likely_equal=likely_equal)
    captured = comparison.captured
    _refuse_divergence(captured, comparison.differences)
    deliveries = _prepare(comm, captured, comparison.differences)
    averaged = _transfer(comm, captured, deliveries, options)
    _adopt(comm, deliveries)
    report = SyncReport(
        differing={captured[one.index].name: one.names for one in deliveries},
        bytes_hashed=comparison.bytes_hashed,
        bytes_sent=sum(one.nbytes for one in deliveries),
    )
    return [*(averaged.get(one.name, one) for one in captured), *apart], report


@without_collections()
def capture_on_root(
    comm: Communicator, states: Sequence[State], parts: bytes | None = None
) -> list[CapturedState]:
    """Take the leaf states as root has them, without comparing anything.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.
        parts: What `take_parts` returned on this rank; None to take them now.

    Returns:
        Their contents on root, not yet digested; nothing elsewhere.

    Raises:
        StageError: On every rank, if a state cannot be captured on root.
    """
    combine_parts(comm, states, parts)
    leaf_states = [state for state in states if isinstance(state, LeafState)]
    captured: list[CapturedState] = []

    def capture() -> None:
        captured.extend(capture_states(leaf_states))

    on_root(comm, _CAPTURING, capture, error=StageError)
    return captured


def _compare(
    comm: Communicator, states: Sequence[LeafState], options: Options, *, likely_equal: bool
) -> tuple[Comparison, list[CapturedState]]:
    """Capture what is compared, compare it; and on root what is saved as it has it."""
    apart = [state for state in states if comm.size == 1 or state.sync_mode == "none"]
    names = {state.name for state in apart}
    threads = options.io.digest_threads

    def capture() -> tuple[list[CapturedState], list[CapturedState]]:
        compared = capture_states(state for state in states if state.name not in names)
        if likely_equal:
            compared = digest_states(compared, threads)
        return compared, capture_states(apart if comm.is_root else ())

    met = meet(
        comm,
        _CAPTURING,
        capture,
        error=StageError,
        digest=(lambda found: digest_of(found[0])) if likely_equal else None,
    )
    compared, rest = met.result
    if not likely_equal:
        return compare_heads_first(comm, compared, threads), rest
    if not met.is_alike:
        return compare(comm, compared), rest
    return Comparison(compared, [], sum(one.form.nbytes for one in compared)), rest


def _refuse_divergence(
    captured: Sequence[CapturedState], differences: Sequence[StateDifference]
) -> None:
    problems = []
    for one in differences:
        own = captured[one.index]
        if own.state.sync_mode == "check":
            # Leaves of another form on each rank have no names that all know.
            names = one.names(() if one.leaves is None else own.specs)
            problems.append(f"state {own.name!r}: {', '.join(names)} differ between ranks")
    # The differences were agreed on, so this is reached by all ranks or by none.
    if problems:
        raise DivergedError(
            "replicas have diverged, nothing was saved:\n  " + "\n  ".join(problems),
            problems=problems,
        )


@dataclass(frozen=True, slots=True)
class _Delivery:
    """How a state that differs becomes equal.

    Attributes:
        index: Of the state.
        names: What a report calls the difference.
        sent: Leaves that root sends: where they are on root, and go to elsewhere.
        averaged: Indices of the leaves that are averaged instead.
        targets: All leaves of the state on this rank.
        arrival: How this rank takes over what has come; None if it keeps what it has.
    """

    index: int
    names: tuple[str, ...]
    sent: tuple[Leaf, ...]
    averaged: tuple[int, ...]
    targets: tuple[Leaf, ...]
    arrival: Arrival | None

    @property
    def nbytes(self) -> int:
        """Bytes that are sent or averaged."""
        averaged = [self.targets[n] for n in self.averaged]
        return sum(leaf.spec.nbytes for leaf in (*self.sent, *averaged))


def _prepare(
    comm: Communicator,
    captured: Sequence[CapturedState],
    differences: Sequence[StateDifference],
) -> list[_Delivery]:
    if not differences:
        return []
    forms = _tell_forms(comm, [captured[one.index] for one in differences])

    def prepare() -> list[_Delivery]:
        return [
            _deliver(captured[one.index], one, *form, is_root=comm.is_root)
            for one, form in zip(differences, forms, strict=True)
        ]

    return agree(comm, "fitting root's states", prepare, error=StageError)


def _tell_forms(
    comm: Communicator, captured: Sequence[CapturedState]
) -> list[tuple[Structure, list[LeafSpec]]]:
    def forms() -> list[list[object]]:
        return [[one.structure, [spec.to_json() for spec in one.specs]] for one in captured]

    told = on_root(comm, "sending the form of the states", forms, error=StageError)
    return [
        (structure, [LeafSpec.from_json(spec) for spec in specs])
        for structure, specs in told
    ]


def _deliver(
    own: CapturedState,
    difference: StateDifference,
    structure: Structure,
    specs: Sequence[LeafSpec],
    *,
    is_root: bool,
) -> _Delivery:
    """Say where root's leaves go on this rank; put in place what is not sent."""
    averaged = _averaged(own, difference)
    everything = tuple(range(len(specs)))
    sent = [
        n
        for n in (everything if difference.leaves is None else difference.leaves)
        if n not in averaged
    ]
    targets, arrival = own.leaves, None
    if averaged or not is_root:
        arrival = own.state.prepare(structure, specs, strict=True)
        targets = tuple([leaf for leaf in arrival.leaves if leaf is not None])
        if difference.leaves is not None:
            _keep_equal(own.leaves, targets, set() if is_root else set(sent))
    return _Delivery(
        index=difference.index,
        names=difference.names(specs),
        sent=tuple(targets[n] for n in sent),
        averaged=averaged,
        targets=targets,
        arrival=arrival,
    )


def _averaged(own: CapturedState, difference: StateDifference) -> tuple[int, ...]:
    if own.state.sync_mode != "mean" or difference.form:
        return ()
    specs = own.specs
    return tuple(n for n in difference.leaves or () if specs[n].dtype in dtypes.FLOATING)


def _keep_equal(
    leaves: Sequence[Leaf], targets: Sequence[Leaf], sent: Collection[int]
) -> None:
    """Fill targets that nothing is sent to from what this rank has: it is the same."""
    for number, (leaf, target) in enumerate(zip(leaves, targets, strict=True)):
        if number not in sent and not _same_memory(leaf, target):
            target.buffer.write(leaf.buffer.read())


def _same_memory(leaf: Leaf, target: Leaf) -> bool:
    one, other = leaf.buffer.view(), target.buffer.view()
    if one is None or other is None or not len(one):
        return False
    return bool(np.shares_memory(np.frombuffer(one, "u1"), np.frombuffer(other, "u1")))


def _transfer(
    comm: Communicator,
    captured: Sequence[CapturedState],
    deliveries: Sequence[_Delivery],
    options: Options,
) -> dict[str, CapturedState]:
    """Send and average; return the states that have new values on root as well."""
    averaged: dict[str, CapturedState] = {}
    for one in deliveries:
        if one.averaged:
            average_leaves(comm, [one.targets[n] for n in one.averaged])
            own = captured[one.index]
            averaged[own.name] = _with_new_digests(own, one)
    sent = [leaf for one in deliveries for leaf in one.sent]
    send_leaves(comm, sent, options.io.window_bytes)
    return averaged


def _with_new_digests(own: CapturedState, delivery: _Delivery) -> CapturedState:
    digests = list(own.digests or ())
    for number in delivery.averaged:
        digests[number] = Digest.of(delivery.targets[number].buffer.read())
    return replace(own, leaves=delivery.targets, digests=tuple(digests))


def _adopt(comm: Communicator, deliveries: Sequence[_Delivery]) -> None:
    if not deliveries:
        return

    def adopt() -> None:
        for one in deliveries:
            if one.arrival is not None:
                one.arrival.adopt()

    agree(comm, "taking over root's states", adopt, error=StageError)
