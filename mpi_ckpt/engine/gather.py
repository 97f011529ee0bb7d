# SPDX-License-Identifier: Apache-2.0
"""What a save takes from the states: made equal or as root has it, and remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.engine.draft import SaveRequest
from mpi_ckpt.engine.remember import remember_request
from mpi_ckpt.engine.sync import capture_on_root, sync_states
from mpi_ckpt.errors import OptionsError
from mpi_ckpt.reports import SyncReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpi_ckpt.engine.contents import Contents
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.state import State

__all__ = ["gather_request", "remember_states"]


def gather_request(
    session: Session,
    states: Sequence[State],
    clock: PhaseClock,
    *,
    step: int,
    sync: bool,
    metrics: Mapping[str, float] | None = None,
    carry: Callable[[str], bool] | None = None,
) -> tuple[SaveRequest, SyncReport]:
    """Take the states as they are to be saved.

    Collective. Main thread only. Nothing is pending. With a memory, the request is over
    the copies in it; a save of some states only leaves none, as none would be complete.

    Args:
        session: The manager's.
        states: The same states in the same order on every rank.
        clock: Started when the save was asked for.
        step: The training step.
        sync: Whether to make the replicas equal first.
        metrics: The program's.
        carry: Tells by name which other states of the newest generation go along; None
            if these are all there are.

    Raises:
        CheckpointError: On every rank, if the states cannot be taken on any.
    """
    synced = SyncReport()
    with clock.phase("sync"):
        if sync:
            contents, synced = sync_states(session.comm, states, session.options)
        else:
            contents = capture_on_root(session.comm, states)
    request = SaveRequest(
        states=_in_order(states, contents),
        step=step,
        size=session.comm.size,
        metrics=dict(metrics or {}),
        carry=carry,
    )
    if session.memory is None:
        return request, synced
    if carry is not None:
        session.memory.clear()
        return request, synced
    with clock.phase("stage"):
        late = session.options.asynchronous
        return remember_request(session.comm, session.memory, request, late=late), synced


def remember_states(session: Session, states: Sequence[State], step: int) -> None:
    """Copy the states into the memory, as they are, without saving them.

    Collective. Main thread only. Nothing is pending.

    Raises:
        StageError: On every rank, if a state cannot be copied on any, or there is no
            memory to copy it to.
    """
    if session.memory is None:
        raise OptionsError("remember() needs a manager that was given a Memory")
    contents = _in_order(states, capture_on_root(session.comm, states))
    request = SaveRequest(states=contents, step=step, size=session.comm.size)
    remember_request(session.comm, session.memory, request, late=False)


def _in_order(
    states: Sequence[State], contents: Sequence[Contents]
) -> list[Contents | State]:
    """Put captured contents, and the states that write themselves, in saving order."""
    by_name = {one.name: one for one in contents}
    return [by_name.get(state.name, state) for state in states]
