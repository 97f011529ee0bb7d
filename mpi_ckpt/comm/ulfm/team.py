# SPDX-License-Identifier: Apache-2.0
"""Divides the ranks of a job into the team that trains, and spares that wait.

The team is the first ranks of the job's communicator. A spare is a started rank that takes
the place of a lost one. It waits in MPI's agreement at the end of each call of the
training, where it arrives early: the agreement ends if the training has ended, or if ranks
were lost. So nobody sends a spare anything while it waits.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm.launch import load_mpi
from mpi_ckpt.comm.liveness import Tag, keep_forever
from mpi_ckpt.comm.survival import lost_ranks
from mpi_ckpt.comm.ulfm.spawning import remember

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

# A spare that looks more often takes a share of a core that the training needs.
_PAUSE_SECONDS = 0.02


class DismissedError(Exception):
    """A spare is needed no more: a rank of the team has left, by an error or at its end."""


def form_team(handle: MPI.Intracomm, places: int) -> MPI.Intracomm:
    """Return a communicator of the first ranks; the others are spares.

    Collective. Main thread only.

    Args:
        handle: Communicator of all ranks.
        places: Number of ranks that train.

    Returns:
        The communicator, ``handle`` itself if there are no spares; COMM_NULL on a spare.
    """
    mpi = load_mpi()
    if places >= handle.size:
        return handle
    team: Any = handle.Split(0 if handle.rank < places else mpi.UNDEFINED, handle.rank)
    remember(team)
    return team  # type: ignore[no-any-return]


def count_alike(handle: MPI.Intracomm, count: int) -> tuple[int, int]:
    """Return the least and the largest of a number that all ranks give. Collective."""
    ours = np.array([count, -count], np.int64)
    bounds = np.empty_like(ours)
    handle.Allreduce(ours, bounds, op=load_mpi().MIN)
    return int(bounds[0]), -int(bounds[1])


def meet_as_spare(handle: MPI.Intracomm, places: int) -> bool:
    """Wait on a spare until the training has ended or ranks of the team were lost.

    Collective: the spare's part of `meet_at_the_end`. Main thread only.

    Args:
        handle: Communicator of all ranks.
        places: Number of ranks that train.

    Returns:
        Whether the training has ended, as `meet_at_the_end` does.

    Raises:
        DismissedError: On a spare, after `dismiss`.
    """

    def wait(request: MPI.Request) -> bool:
        while not request.Test():
            if is_dismissed(handle):
                raise DismissedError
            time.sleep(_PAUSE_SECONDS)
        return True

    return agree_on_the_end(handle, places, True, wait)


def agree_on_the_end(
    handle: MPI.Intracomm, places: int, done: bool, wait: Callable[[MPI.Request], bool]
) -> bool:
    """Agree on whether all ranks are done and none of the team was lost.

    Collective; the communicator may have been revoked. Main thread only.

    Args:
        handle: Communicator of all ranks.
        places: Number of ranks that train.
        done: Whether this rank is done.
        wait: Waits for the agreement; returns whether it came to its end.

    Returns:
        The same on every rank. True on this rank if it stopped waiting.
    """
    mpi = load_mpi()
    while True:
        flag = np.array([done], np.int32)
        request = None
        try:
            request = handle.Iagree(flag)
            if not wait(request):
                keep_forever(request, flag)
                return True
        except DismissedError:
            keep_forever(request, flag)
            raise
        except mpi.Exception:
            if places >= handle.size or not flag[0]:
                return False
            # All live ranks are done, and all have this error: they agree once more, since
            # each may know of other losses.
            done = _are_only_spares_lost(handle, places)
        else:
            return bool(flag[0])


def _are_only_spares_lost(handle: MPI.Intracomm, places: int) -> bool:
    """Return whether the team is whole; lost ranks are no error of later agreements."""
    # In this order: a rank that is lost in between still is an error of the next one.
    handle.Ack_failed()
    return all(rank >= places for rank in lost_ranks(handle))


def await_dismissal(handle: MPI.Intracomm) -> None:
    """Wait on a spare for `dismiss`, where ranks cannot be replaced. Not collective."""
    while not is_dismissed(handle):
        time.sleep(_PAUSE_SECONDS)


def dismiss(handle: MPI.Intracomm, places: int) -> None:
    """Let the spares leave. Not collective. Main thread only.

    Args:
        handle: Communicator of all ranks.
        places: Number of ranks that train; the others are spares.
    """
    mpi, token = load_mpi(), np.zeros(1, np.uint8)
    for spare in range(places, handle.size):
        try:
            keep_forever(handle.Isend(token, spare, Tag.DISMISSAL), token)
        except mpi.Exception:
            continue  # it is lost


def is_dismissed(handle: MPI.Intracomm) -> bool:
    """Return whether a rank of the team has let the spares go. Not collective."""
    mpi = load_mpi()
    try:
        return bool(handle.Iprobe(mpi.ANY_SOURCE, Tag.DISMISSAL))
    except mpi.Exception:
        return False  # a rank was lost
