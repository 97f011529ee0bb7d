# SPDX-License-Identifier: Apache-2.0
"""Makes replicas equal: compares digests first, and sends only what differs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree, meet, printed_by
from mpi_ckpt.engine.sync.captured import (
    CapturedState,
    capture_states,
    digest_of,
    digest_rest,
    fingerprint_states,
    places_of,
)
from mpi_ckpt.engine.sync.comparing import (
    Comparison,
    StateDifference,
    compare,
    compare_heads_first,
)
from mpi_ckpt.engine.sync.deliveries import deliver
from mpi_ckpt.engine.sync.parts import OwnParts, capture_apart, combine_parts
from mpi_ckpt.errors import DivergedError, StageError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.reports import SyncReport
from mpi_ckpt.state import LeafState, PartsState
from mpi_ckpt.states.unshared.ranked import RankedState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from mpi_ckpt.comm import Communicator, Meeting
    from mpi_ckpt.engine.sync.parts import PartsInTransit
    from mpi_ckpt.options import Options
    from mpi_ckpt.state import State

logger = logging.getLogger(__name__)


_NAMES_MAX = 12


class SyncLog:
    """Logs what saves have made equal: by name at first, then in numbers.

    Not collective. Called on root only. The running statistics of batch normalization
    differ at every save of a data-parallel training: one log line about them is useful, a
    line at every save is not.
    """

    def __init__(self) -> None:
        self._named_states: set[str] = set()

    def log_save(self, report: SyncReport, states: Sequence[State], step: int) -> None:
        """Log what the sync before a save has changed, and name each state once.

        Args:
            report: Report of the sync.
            states: The synced states.
            step: The training step of the save.
        """
        # States in parts differ until root has joined the parts.
        parts = {state.name for state in states if isinstance(state, PartsState)}
        differing = {k: leaves for k, leaves in report.differing.items() if k not in parts}
        if not differing:
            return
        modes = _modes(states)
        for name, leaves in differing.items():
            if name not in self._named_states:
                self._named_states.add(name)
                logger.warning(
                    "state %r differed between ranks at step %d, and the save has made it "
                    "equal: all ranks now have %s of %s. Later saves report numbers only "
                    "(INFO, and SaveReport.sync)",
                    *(name, step, _source(modes[name]), listed(leaves)),
                )
        logger.info(
            "step %d: %s differed between ranks, and were made equal",
            *(step, _counted(differing)),
        )


def log_sync(report: SyncReport, states: Sequence[State]) -> None:
    """Log what an explicit sync has changed.

    Not collective. Called on root only. A warning for a state that compares its replicas,
    which should not differ; else a line of INFO.

    Args:
        report: Report of the sync.
        states: The synced states.
    """
    modes = _modes(states)
    for name, leaves in report.differing.items():
        level = logging.WARNING if modes[name] == "check" else logging.INFO
        logger.log(
            level,
            "sync(): state %r differed between ranks: all now have %s of %s",
            *(name, _source(modes[name]), listed(leaves)),
        )


def _modes(states: Sequence[State]) -> dict[str, str]:
    return {state.name: state.sync_mode for state in states if isinstance(state, LeafState)}


def _source(mode: str) -> str:
    if mode == "mean":
        return "the average (or root's values, where there is no average)"
    return "root's values"


def listed(leaves: Sequence[str]) -> str:
    """Return 12 names of leaves in words, and the number of the rest. Not collective."""
    more = len(leaves) - _NAMES_MAX
    shown = ", ".join(leaves[:_NAMES_MAX]) or "nothing but its form"
    return f"{shown} and {more:,} more" if more > 0 else shown


def _counted(differing: Mapping[str, Sequence[str]]) -> str:
    leaves = sum(map(len, differing.values()))
    return f"{leaves} leaves of {len(differing)} states"


WAITING_BYTES_MIN = 64 << 20
"""States of fewer bytes are compared before root begins its work: one meeting less."""

_STATES_MAX = 12
_CAPTURING = "capturing the states"
_WAYS = (
    "if each rank has a value of its own, take a PerRankState; if arrays are parts of one "
    'field, a ShardedArrayState; if root\'s is right for all, give sync="root", or call '
    "sync() once. (structure): plain values, or names and shapes of arrays"
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
        uncompared: Those of them that `compare_beside` must still compare.
        parts: The parts of ranks among the contents, which are still to be handed over.
    """

    captured: list[CapturedState]
    report: SyncReport
    is_cut: bool
    uncompared: list[CapturedState] = field(default_factory=list)
    parts: PartsInTransit | None = None

    @property
    def proven_equal(self) -> set[str]:
        """Names of the states whose leaves have been the same on all ranks."""
        digested = [one for one in self.captured if one.digests is not None]
        compared = {one.name for one in digested if not isinstance(one.state, RankedState)}
        return compared - set(self.report.differing)


@without_collections()
def sync_states(
    comm: Communicator,
    states: Sequence[State],
    options: Options,
    *,
    parts: OwnParts | None = None,
    apart: Collection[str] = (),
    forced: bool = False,
    may_wait: bool = False,
    also_cut: bool = False,
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
        may_wait: Whether to leave the comparison of large states to `compare_beside`.
        also_cut: Whether it may wait even if leaves are cut over the ranks.

    Raises:
        DivergedError: On every rank, if a state that checks is not equal everywhere.
        StageError: On every rank, if any rank cannot sync or capture a state.
        StateMismatchError: On every rank, if root's contents do not fit on any.
    """
    for state in states:
        if not isinstance(state, LeafState):
            agree(comm, f"sync() of state {state.name!r}", state.sync, error=StageError)
    if forced:
        # What each rank has of its own stays as it is.
        states = [state for state in states if not isinstance(state, RankedState)]
    threads = options.io.digest_threads
    transit = combine_parts(comm, states, parts, apart, threads=threads)
    leaf_states = [state for state in states if isinstance(state, LeafState)]
    met = _capture(
        comm, leaf_states, options, apart, transit, forced=forced, may_wait=may_wait
    )
    compared, rest = met.result
    rest = [*rest, *transit.captured]
    uncompared = [one for one in compared if not one.is_comparable]
    waits = not forced and bool(uncompared)
    if waits and met.is_alike and (also_cut or not met.is_flagged):
        contents = [*compared, *rest]
        return SyncedStates(contents, SyncReport(), met.is_flagged, uncompared, transit)
    if forced:
        comparison = compare_heads_first(comm, compared, threads)
    elif waits or (may_wait and not met.is_alike):
        comparison = compare(comm, _digest(comm, compared, threads), threads)
    else:
        comparison = _compare(comm, compared, threads, is_alike=met.is_alike)
    synced = _make_equal(comm, comparison, rest, options, forced=forced)
    if forced and comm.is_root:
        log_sync(synced.report, states)
    return replace(synced, is_cut=met.is_flagged, parts=transit)


@without_collections()
def compare_beside(
    comm: Communicator,
    synced: SyncedStates,
    options: Options,
    doing: str,
    work: Callable[[], list[CapturedState]],
) -> SyncedStates:
    """Compare what `sync_states` has left, beside work of root; make it equal.

    Collective. Main thread only. Root's values win or the save fails: root may already
    write them while the other ranks find out whether theirs are the same.

    Args:
        comm: The communicator.
        synced: What `sync_states` returned.
        options: Its threads and window are used.
        doing: The work, for the error.
        work: Does this rank's work, and returns its ``uncompared`` states digested. Must
            not communicate.

    Raises:
        CheckpointError: On every rank, as `sync_states` does, or if the work failed on any.
    """
    met = meet(comm, doing, work, error=StageError, digest=digest_of)
    names = {one.name for one in synced.uncompared}
    rest = [one for one in synced.captured if one.name not in names]
    threads = options.io.digest_threads
    comparison = _compare(comm, met.result, threads, is_alike=met.is_alike)
    compared = _make_equal(comm, comparison, rest, options, forced=False)
    return replace(compared, is_cut=synced.is_cut)


def _compare(
    comm: Communicator, compared: list[CapturedState], threads: int, *, is_alike: bool
) -> Comparison:
    if not is_alike:
        return compare(comm, compared, threads)
    return Comparison(compared, [], sum(one.form.nbytes for one in compared))


def _make_equal(
    comm: Communicator,
    comparison: Comparison,
    rest: Sequence[CapturedState],
    options: Options,
    *,
    forced: bool,
) -> SyncedStates:
    captured = comparison.captured
    if not forced:
        _refuse_divergence(comm, captured, comparison.differences)
    delivered = deliver(comm, captured, comparison.differences, options)
    report = SyncReport(
        differing=delivered.names,
        bytes_hashed=comparison.bytes_hashed,
        bytes_sent=delivered.nbytes,
    )
    averaged = delivered.averaged
    contents = [*(averaged.get(one.name, one) for one in captured), *rest]
    return SyncedStates(contents, report, is_cut=False)


def _digest(
    comm: Communicator, compared: Sequence[CapturedState], threads: int
) -> list[CapturedState]:
    return agree(comm, _CAPTURING, lambda: digest_rest(compared, threads), error=StageError)


@without_collections()
def capture_on_root(
    comm: Communicator,
    states: Sequence[State],
    parts: OwnParts | None = None,
    apart: Collection[str] = (),
    *,
    threads: int,
) -> SyncedStates:
    """Capture root's leaf states and all ranks' tiles, without any comparison.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.
        parts: Result of `take_parts` on this rank; None to take the parts now.
        apart: As for `sync_states`.
        threads: Threads that hash.

    Returns:
        The contents, not yet digested; on other ranks those of states with tiles.

    Raises:
        StageError: On every rank, if a state cannot be captured on any.
    """
    transit = combine_parts(comm, states, parts, apart, threads=threads)
    leaf_states = [state for state in states if isinstance(state, LeafState)]

    def capture() -> list[CapturedState]:
        transit.learn()
        own = capture_apart(leaf_states, apart)
        rest = [state for state in leaf_states if not isinstance(state, RankedState)]
        if comm.is_root:
            return [*capture_states(rest), *own]
        may_be_cut = [s for s in rest if not isinstance(s, PartsState)]
        return [*(one for one in capture_states(may_be_cut) if one.cut), *own]

    met = meet(comm, _CAPTURING, capture, error=StageError, flag=_has_tiles)
    contents = [*met.result, *transit.captured]
    return SyncedStates(contents, SyncReport(), met.is_flagged, parts=transit)


def _has_tiles(captured: Sequence[CapturedState]) -> bool:
    return any(one.cut for one in captured)


def _capture(
    comm: Communicator,
    states: Sequence[LeafState],
    options: Options,
    apart: Collection[str],
    transit: PartsInTransit,
    *,
    forced: bool,
    may_wait: bool,
) -> Meeting[tuple[list[CapturedState], list[CapturedState]]]:
    """Capture the compared states, and the others on root or apart.

    If they are alike, those with digests or fingerprints are the same on all ranks, and the
    others have the same form.
    """
    threads = options.io.digest_threads
    names = {state.name for state in states if _is_root_only(comm, state, forced=forced)}

    def capture() -> tuple[list[CapturedState], list[CapturedState]]:
        transit.learn()
        compared = capture_states(state for state in states if state.name not in names)
        if may_wait:
            compared = _with_fingerprints(compared, threads)
        if not (forced or (may_wait and _is_worth_waiting(compared))):
            compared = digest_rest(compared, threads)
        root_only = [
            s for s in states if s.name in names and not isinstance(s, RankedState)
        ]
        of_root = capture_states(root_only if comm.is_root else ())
        if may_wait and options.io.reuse:
            of_root = _with_fingerprints(of_root, threads)
        return compared, [*of_root, *capture_apart(states, apart)]

    return meet(
        comm,
        _CAPTURING,
        capture,
        error=StageError,
        digest=None if forced else (lambda found: _digest_taken(found[0])),
        flag=lambda found: any(map(_has_tiles, found)),
    )


def _with_fingerprints(
    captured: Sequence[CapturedState], threads: int
) -> list[CapturedState]:
    """Fingerprint what root alone will write, without a gate.

    What is written in another way needs digests: they say which bytes other ranks write,
    and whether a copy behind a gate is what was compared.
    """
    found = {one.name: one for one in captured if _is_for_fingerprints(one)}
    made = fingerprint_states(list(found.values()), threads)
    found = {one.name: one for one in made}
    return [found.get(one.name, one) for one in captured]


def _is_for_fingerprints(captured: CapturedState) -> bool:
    """Return whether a state is on a device, with little in host memory and no gate."""
    places = np.frombuffer(places_of(captured), np.uint8)
    if not places.any() or any(leaf.gate is not None for leaf in captured.leaves):
        return False
    return bool(captured.form.sizes[places == 0].sum() < WAITING_BYTES_MIN)


def _is_worth_waiting(captured: Sequence[CapturedState]) -> bool:
    """Return whether root should begin its work before the states are compared.

    Averages are not known before.
    """
    waiting = [one for one in captured if not one.is_comparable]
    if any(one.state.sync_mode == "mean" for one in waiting):
        return False
    return sum(one.form.nbytes for one in waiting) >= WAITING_BYTES_MIN


def _digest_taken(captured: Sequence[CapturedState]) -> bytes:
    if all(one.is_comparable for one in captured):
        return digest_of(captured)
    known = [digest_of([one]) if one.is_comparable else one.form.text for one in captured]
    return digest_bytes(b"".join(known))


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
