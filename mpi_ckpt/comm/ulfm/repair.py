# SPDX-License-Identifier: Apache-2.0
"""Repairs a communicator after ranks have died: with fewer ranks, or with new ones.

Ranks may die during a repair as well. So each part that can fail is a step on which all
survivors agree by MPI's own agreement, which works although ranks die. If a step failed on
any rank, the communicators it made are revoked, so that no rank waits in them, and all
begin again with the remaining ranks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mpi_ckpt.comm.communicator import open_communicators
from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import is_done_within
from mpi_ckpt.comm.ulfm import spawning
from mpi_ckpt.comm.ulfm.guard import Guard
from mpi_ckpt.comm.ulfm.team import agree_on_the_end, form_team

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mpi4py import MPI

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SPAWNS_MAX = 3
# A thousand times as long as it takes if no rank is missing.
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Repaired:
    """The result of a repair.

    Attributes:
        handle: The communicator; its rank 0 is the survivor with the newest copy.
        team: Its first ranks, which train; COMM_NULL on a spare.
        lost: The ranks of the previous communicator that have died.
        spawned: Number of new ranks, which are the last ones.
    """

    handle: MPI.Intracomm
    team: MPI.Intracomm
    lost: tuple[int, ...]
    spawned: int


class _AgainError(Exception):
    """A step failed on some rank; the same on every survivor."""


def duplicate(comm: MPI.Intracomm | None) -> MPI.Intracomm:
    """Return a duplicate that can be revoked without affecting the original.

    Collective. Main thread only.

    Args:
        comm: The user's communicator; None is the world.
    """
    parent = load_mpi().COMM_WORLD if comm is None else comm
    return parent.Dup()


def let_go(handle: MPI.Intracomm, others: Iterable[MPI.Comm] = ()) -> None:
    """Wake all ranks that wait in a communicator, in others made from it, or in our own.

    Not collective. Main thread only.

    Args:
        handle: Communicator that lost a rank.
        others: Communicators of the user.
    """
    # MPI: only ranks that wait in the broken communicator learn of the loss; those that
    # wait in another one would wait for ever.
    ours = [own for communicator in open_communicators() for own in communicator.give_up()]
    for revoked in [*ours, *others, handle]:
        _revoke(revoked)
    spawning.remember(*ours)


def meet_at_the_end(
    handle: MPI.Intracomm,
    done: bool,
    seconds: float | None = None,
    places: int | None = None,
) -> bool:
    """Agree on whether all ranks are done and none was lost.

    Collective; the communicator may have been revoked. Main thread only.

    Args:
        handle: The communicator.
        done: Whether this rank is done.
        seconds: How long to wait for the others; None: as long as they live.
        places: Number of ranks, the first ones, whose loss counts; None for all.

    Returns:
        The same on every rank. True on this rank if another did not arrive in time.
    """

    def wait(request: MPI.Request) -> bool:
        return is_done_within(request, seconds)

    places = handle.size if places is None else places
    return agree_on_the_end(handle, places, done, wait)


def repair(
    handle: MPI.Intracomm,
    *,
    newest: int,
    places: int,
    replace: bool,
    start_seconds: float,
) -> Repaired:
    """Return a communicator of all live ranks and of replacements for lost ones.

    Collective, on all survivors, after `let_go`. Main thread only.

    Args:
        handle: Communicator that lost ranks.
        newest: Age of this rank's copy of the states, larger for later ones; -1 for none.
        places: Number of ranks that train, if there are so many: the rest are spares.
        replace: Whether to start ranks if there are fewer.
        start_seconds: How long a new rank may take to join.
    """
    before, spawns = handle, 0
    while True:
        # All survivors have met, so each arrives soon.
        with Guard("going on after a lost rank", _SECONDS):
            survivors = _shrink(before)
        may_start = replace and spawns < _SPAWNS_MAX
        missing = places - survivors.size if may_start else 0
        try:
            ordered = _step(survivors, partial(_order, survivors, newest))
            lost = _missing_in(ordered, handle)
            if missing <= 0:
                return Repaired(ordered, _divide(survivors, ordered, places), lost, 0)
            spawns += 1
            merged = _add(survivors, ordered, missing, start_seconds)
        except _AgainError:
            before = survivors
            if spawns == _SPAWNS_MAX:
                logger.warning("no rank can be started; going on with fewer")
        else:
            return Repaired(merged, merged, lost, missing)


def _divide(survivors: MPI.Intracomm, ordered: MPI.Intracomm, places: int) -> MPI.Intracomm:
    """Return the communicator of the ranks that train, all if there are no spares."""
    if places >= ordered.size:
        return ordered
    return _step(survivors, partial(form_team, ordered, places), ordered)


def _add(
    survivors: MPI.Intracomm, ordered: MPI.Intracomm, count: int, seconds: float
) -> MPI.Intracomm:
    """Start new ranks, one after the other; ranks that have joined take part."""
    starter = _step(survivors, partial(spawning.choose_starter, ordered), ordered)
    whole = ordered
    for more in reversed(range(count)):
        start = spawning.Start(whole, starter, more, seconds)
        _step(survivors, start.begin, whole)
        between = _step(survivors, start.accept, whole)
        whole = _step(survivors, partial(_merge, between), between, whole)
    return whole


def _merge(between: MPI.Intercomm) -> MPI.Intracomm:
    return spawning.merge(between, high=False)


def _step(survivors: MPI.Intracomm, work: Callable[[], Result], *used: MPI.Comm) -> Result:
    """Do one step of a repair; raise if it failed on any survivor."""
    mpi = load_mpi()
    result: Any = None
    try:
        result = work()
        done = True
    except mpi.Exception as error:
        logger.info("a step of the repair failed: %s", error)
        done = False
        # Ranks that wait in it wait for this rank.
        for revoked in (*used, survivors):
            _revoke(revoked)
    if meet_at_the_end(survivors, done):
        return result  # type: ignore[no-any-return]
    for revoked in (*used, *([result] if isinstance(result, mpi.Comm) else [])):
        _revoke(revoked)
    raise _AgainError


def _shrink(handle: MPI.Intracomm) -> MPI.Intracomm:
    _revoke(handle)
    survivors: Any = handle.Shrink()
    spawning.remember(survivors)
    return survivors  # type: ignore[no-any-return]


def _order(survivors: MPI.Intracomm, newest: int) -> MPI.Intracomm:
    """Put the rank with the newest copy first, and keep the order of all others."""
    if survivors.size == 1:
        return survivors
    mine = np.array([newest], np.int64)
    everyone = np.empty(survivors.size, np.int64)
    survivors.Allgather(mine, everyone)
    first = int(everyone.argmax())
    if first == 0:
        return survivors
    ordered: Any = survivors.Split(0, -1 if survivors.rank == first else survivors.rank)
    spawning.remember(ordered)
    return ordered  # type: ignore[no-any-return]


def _missing_in(after: MPI.Intracomm, before: MPI.Intracomm) -> tuple[int, ...]:
    mpi = load_mpi()
    old, new = before.Get_group(), after.Get_group()
    found = old.Translate_ranks(None, new)
    old.Free()
    new.Free()
    return tuple(rank for rank, place in enumerate(found) if place == mpi.UNDEFINED)


def _revoke(handle: MPI.Comm) -> None:
    mpi = load_mpi()
    if handle != mpi.COMM_NULL:
        try:
            handle.Revoke()
        except mpi.Exception as error:
            logger.info("a communicator cannot be revoked: %s", error)
