# SPDX-License-Identifier: Apache-2.0
"""Brings states back to the newest generation that proves good."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree
from mpi_ckpt.engine.find import find_newest, fit_states, is_lost, reject
from mpi_ckpt.engine.incoming import adopt, match
from mpi_ckpt.engine.parts import deal_parts
from mpi_ckpt.engine.read import transfer
from mpi_ckpt.engine.readers import open_readers
from mpi_ckpt.engine.recall import recall_states
from mpi_ckpt.engine.report import report_restore
from mpi_ckpt.errors import CorruptGenerationError, ReadError, RestoreError
from mpi_ckpt.states.ranked import RankedState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpi_ckpt.engine.find import Fit, Found
    from mpi_ckpt.engine.incoming import Incoming
    from mpi_ckpt.engine.readers import Readers
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import PhaseClock, RestoreReport
    from mpi_ckpt.state import State

__all__ = ["OnResize", "restore_states", "tell_of_resize"]

logger = logging.getLogger(__name__)

OnResize: TypeAlias = "Callable[[int, int], object]"
"""Given the number of ranks that saved, and that of now."""

_RESTORED = "the states are as they were saved, but for what it has changed itself"


@without_collections
def restore_states(
    session: Session,
    states: Sequence[State],
    clock: PhaseClock,
    *,
    partial: bool,
    pinned: int | None,
) -> RestoreReport | None:
    """Restore states from memory, else from the newest good generation.

    Collective. Main thread only. Bad generations are set aside.

    Args:
        session: The manager's.
        states: What to restore, the same on every rank.
        clock: Started when the restore was asked for.
        partial: Whether the program asks for some of its states only.
        pinned: Number of the generation to use; None for the newest.

    Returns:
        The report; None, with nothing changed, if nothing was ever saved.

    Raises:
        RestoreError: On every rank; see `CheckpointManager.restore`.
    """
    memory = session.memory
    if memory is not None and not partial:
        report = recall_states(session, memory, states, clock)
        if report is not None:
            return report
        # An older copy of another rank's must not be gone back to from here.
        memory.clear()
    while True:
        with find_newest(session, states, pinned=pinned, proven=partial) as found:
            if found is None:
                return None
            strict = session.options.strict
            fit = fit_states(found, states, partial=partial, strict=strict)
            try:
                with open_readers(session, found) as readers:
                    fit = _bring_back(session, found, readers, fit, clock)
                    nbytes = readers.bytes_read(session)
            # Agreed on: every rank is here, with the same error.
            except CorruptGenerationError as problem:
                if pinned is not None:
                    raise
                reject(session, found, problem)
            except ReadError:
                if pinned is not None or not is_lost(session, found):
                    raise
            else:
                report = report_restore(session, found, fit, nbytes, clock)
                _warn_of_differences(session, report)
                return report


def _bring_back(
    session: Session, found: Found, readers: Readers, fit: Fit, clock: PhaseClock
) -> Fit:
    with clock.phase("match"):
        incoming = agree(
            session.comm,
            "matching a generation with the program",
            lambda: match(found.description, fit.states, strict=session.options.strict),
            error=RestoreError,
        )
    with clock.phase("transfer"):
        # First, as this overwrites nothing yet.
        incoming = [_with_part(session, found, one) for one in incoming]
        transfer(
            session.comm,
            readers,
            [one for one in incoming if not isinstance(one.state, RankedState)],
            block_bytes=found.description["block_bytes"],
            window_bytes=session.options.window_bytes,
        )
    with clock.phase("adopt"):
        adopt(session.comm, incoming)
    return replace(
        fit,
        missing_leaves={
            one.state.name: one.arrival.missing for one in incoming if one.arrival.missing
        },
        unexpected_leaves={
            one.state.name: one.arrival.unexpected
            for one in incoming
            if one.arrival.unexpected
        },
    )


def _warn_of_differences(session: Session, report: RestoreReport) -> None:
    told = {
        "only the program has": [*report.missing, *_paths(report.missing_leaves)],
        "only the generation has": [*report.unexpected, *_paths(report.unexpected_leaves)],
    }
    for side, names in told.items():
        if names and session.comm.is_root:
            logger.warning("generation %d: %s %s", report.generation, side, names)


def _paths(leaves: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [f"{state}/{leaf}" for state, names in leaves.items() for leaf in names]


def _with_part(session: Session, found: Found, one: Incoming) -> Incoming:
    if not isinstance(one.state, RankedState):
        return one
    saved = one.structure[one.state.count_key]
    return replace(one, arrival=deal_parts(session, found.reader, one.state, saved))


def tell_of_resize(
    session: Session, report: RestoreReport, callback: OnResize | None
) -> None:
    """Let the program adapt to another number of ranks than the one that saved.

    Collective. Main thread only.

    Args:
        session: The manager's.
        report: Of the restore that has just ended.
        callback: The program's; given the number of ranks that saved, and that of now.

    Raises:
        RestoreError: On every rank, if the callback failed on any.
    """
    if report.saved_size == report.size:
        return

    def tell() -> None:
        if callback is not None:
            callback(report.saved_size, report.size)

    agree(session.comm, "on_resize()", tell, error=RestoreError, safe=_RESTORED)
