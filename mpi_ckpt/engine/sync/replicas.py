# SPDX-License-Identifier: Apache-2.0
"""Makes replicas equal: compares digests first, and sends only what differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree, meet, printed_by
from mpi_ckpt.engine.sync.captured import (
    CapturedState,
    capture_own_parts,
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
from mpi_ckpt.engine.sync.deliveries import deliver
from mpi_ckpt.engine.sync.parts import combine_parts
from mpi_ckpt.engine.sync.sync_log import listed, log_sync
from mpi_ckpt.errors import DivergedError, StageError
from mpi_ckpt.reports import SyncReport
from mpi_ckpt.state import LeafState, PartsState
from mpi_ckpt.states.unshared.ranked import RankedState

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.options import Options
    from mpi_ckpt.state import State

_STATES_MAX = 12
_CAPTURING = "capturing the states"
_WAYS = (
    "if each rank has a value of its own, take a PerRankState; if root's is right for all, "
    'give sync="root", or call sync() once'
)


@dataclass(frozen=True, slots=True)
class SyncedStates:
    """The contents of leaf states, ready to be saved.

    Attributes:
        captured: Root's contents, in any order; on other ranks they may be older than
            root's, or missing, but for the tiles of cut leaves.
        report: What has differed.
        is_cut: Whether any rank has a leaf that is cut over the ranks; the same on every
            rank.
    """

    captured: list[CapturedState]
    report: SyncReport
    is_cut: bool


@without_collections()
def sync_states(
    comm: Communicator,
    states: Sequence[State],
    options: Options,
    *,
    parts: bytes | None = None,
    apart: Collection[str] = (),
    forced: bool = False,
) -> SyncedStates:
    """Make states equal on all ranks, each by its own sync mode.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.
        options: Its threads and window are used.
        parts: Result of `take_parts` on this rank; None to take the parts now.
        apart: Names of states whose parts are not joined: each rank captures its own.
        forced: Whether all ranks take root's values, also for states that check. Replicas
            are then likely to differ, so first bytes are compared first: leaves that differ
            there need no digest. States that each rank has for itself are left alone.

    Raises:
        DivergedError: On every rank, if a state that checks is not equal everywhere.
        StageError: On every rank, if any rank cannot sync or capture a state.
        StateMismatchError: On every rank, if root's contents do not fit on any.
    """
    for state in states:
        if not isinstance(state, LeafState):
            agree(comm, f"sync() of state {state.name!r}", state.sync, error=StageError)
    combine_parts(comm, states, parts, apart)
    leaf_states = [state for state in states if isinstance(state, LeafState)]
    comparison, root_only, is_cut = _compare(
        comm, leaf_states, options, apart, forced=forced
    )
    captured = comparison.captured
    if not forced:
        _refuse_divergence(comm, captured, comparison.differences)
    delivered = deliver(comm, captured, comparison.differences, options)
    report = SyncReport(
        differing=delivered.names,
        bytes_hashed=comparison.bytes_hashed,
        bytes_sent=delivered.nbytes,
    )
    if forced and comm.is_root:
        log_sync(report, states)
    averaged = delivered.averaged
    contents = [*(averaged.get(one.name, one) for one in captured), *root_only]
    return SyncedStates(contents, report, is_cut)


@without_collections()
def capture_on_root(
    comm: Communicator,
    states: Sequence[State],
    parts: bytes | None = None,
    apart: Collection[str] = (),
) -> SyncedStates:
    """Capture root's leaf states and all ranks' tiles, without any comparison.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.
        parts: Result of `take_parts` on this rank; None to take the parts now.
        apart: As for `sync_states`.

    Returns:
        The contents, not yet digested; on other ranks those of states with tiles.

    Raises:
        StageError: On every rank, if a state cannot be captured on any.
    """
    combine_parts(comm, states, parts, apart)
    leaf_states = [state for state in states if isinstance(state, LeafState)]

    def capture() -> list[CapturedState]:
        own = _capture_apart(leaf_states, apart)
        rest = [state for state in leaf_states if state.name not in apart]
        if comm.is_root:
            return [*capture_states(rest), *own]
        may_be_cut = [s for s in rest if not isinstance(s, PartsState)]
        return [*(one for one in capture_states(may_be_cut) if one.cut), *own]

    met = meet(comm, _CAPTURING, capture, error=StageError, flag=_has_tiles)
    return SyncedStates(met.result, SyncReport(), met.is_flagged)


def _capture_apart(
    states: Sequence[LeafState], apart: Collection[str]
) -> list[CapturedState]:
    return capture_own_parts(
        state for state in states if isinstance(state, RankedState) and state.name in apart
    )


def _has_tiles(captured: Sequence[CapturedState]) -> bool:
    return any(one.cut for one in captured)


def _compare(
    comm: Communicator,
    states: Sequence[LeafState],
    options: Options,
    apart: Collection[str],
    *,
    forced: bool,
) -> tuple[Comparison, list[CapturedState], bool]:
    """Capture and compare the compared states; capture the others on root, or apart."""
    names = {state.name for state in states if _is_root_only(comm, state, forced=forced)}
    threads = options.io.digest_threads

    def capture() -> tuple[list[CapturedState], list[CapturedState]]:
        compared = capture_states(state for state in states if state.name not in names)
        if not forced:
            compared = digest_states(compared, threads)
        root_only = [s for s in states if s.name in names and s.name not in apart]
        of_root = capture_states(root_only if comm.is_root else ())
        return compared, [*of_root, *_capture_apart(states, apart)]

    met = meet(
        comm,
        _CAPTURING,
        capture,
        error=StageError,
        digest=None if forced else (lambda found: digest_of(found[0])),
        flag=lambda found: any(map(_has_tiles, found)),
    )
    compared, rest = met.result
    if forced:
        comparison = compare_heads_first(comm, compared, threads)
    elif not met.is_alike:
        comparison = compare(comm, compared)
    else:
        nbytes = sum(one.form.nbytes for one in compared)
        comparison = Comparison(compared, [], nbytes)
    return comparison, rest, met.is_flagged


def _is_root_only(comm: Communicator, state: LeafState, *, forced: bool) -> bool:
    """Return whether a state is captured on root alone, without a comparison.

    A save also compares a state with sync mode "none": otherwise it would acknowledge the
    value of one rank as that of all.
    """
    if comm.size == 1 or isinstance(state, RankedState):
        return True
    return forced and state.sync_mode == "none"


def _refuse_divergence(
    comm: Communicator,
    captured: Sequence[CapturedState],
    differences: Sequence[StateDifference],
) -> None:
    lines, problems = [], []
    for difference in differences:
        own = captured[difference.index]
        if own.state.sync_mode in ("check", "none"):
            # If the leaves' forms differ between ranks, no names are common to all.
            names = difference.names(() if difference.leaves is None else own.form.names)
            problems.append(f"state {own.name!r}: {', '.join(names)} differ between ranks")
            lines.append(f"state {own.name!r}: {listed(names)} differ between ranks")
    # The ranks agreed on the differences, so all ranks reach this or none.
    if problems:
        more = len(lines) - _STATES_MAX
        lines[_STATES_MAX:] = [f"and {more:,} more states"] if more > 0 else []
        error = DivergedError(
            "\n  ".join(["replicas have diverged, nothing was saved:", *lines, _WAYS]),
            problems=problems,
        )
        raise printed_by(comm, error)
