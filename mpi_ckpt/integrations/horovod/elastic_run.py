# SPDX-License-Identifier: Apache-2.0
"""Runs a training that goes back to its last commit when a Horovod collective fails."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm.launch import find_horovod
from mpi_ckpt.errors import OptionsError, RegistrationError
from mpi_ckpt.integrations.horovod.elastic_state import HorovodState, commits_of
from mpi_ckpt.integrations.horovod.interrupts import RollBackError, roll_backs, updates
from mpi_ckpt.integrations.horovod.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run"]

logger = logging.getLogger(__name__)

# A rank that goes back while others are in another call meets them at the second try.
_MEETINGS = 3


def run(
    function: Callable[..., Any] | None = None, *, tries: int = 3
) -> Callable[..., Any]:
    """Wrap a training function, as ``horovod.elastic.run`` does.

    The wrapper is collective, and its first argument is a `HorovodState`. It syncs the
    state and calls the function. After a `RollBackError` or ``HorovodInternalError`` it
    shuts Horovod down, goes back to the last commit, starts Horovod again on the same
    ranks, calls ``on_reset``, syncs, and calls the function again. After a
    ``HostsUpdatedInterrupt`` it does the same without going back. When the function
    returns, the wrapper commits the state durably and closes it.

    Args:
        function: Function that takes the state and the other arguments.
        tries: How often the training may fail after the same commit.

    Raises:
        OptionsError: On every rank, if ``tries`` is below 1.
    """
    if tries < 1:
        raise OptionsError(f"tries is {tries}: at least 1")
    if function is None:
        return functools.partial(run, tries=tries)
    training = function

    @functools.wraps(training)
    def wrapper(state: HorovodState, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        if not isinstance(state, HorovodState):
            raise RegistrationError(
                f"run() needs a TorchState or HorovodState, not {state!r}"
            )
        recovery = _Recovery(state, tries)
        with state:
            while True:
                try:
                    recovery.meet_anew()
                    state.sync()
                    return training(state, *args, **kwargs)
                except roll_backs() as error:
                    recovery.go_back(error)
                except updates():
                    recovery.stop_horovod()

    return wrapper


class _Recovery:
    """Brings a state and Horovod back to a point where a training can go on.

    Collective, as is every method.
    """

    def __init__(self, state: HorovodState, tries: int) -> None:
        self._state = state
        self._tries = tries
        self._failures = 0
        self._commit = -1
        self._is_reset = True
        self._horovod = find_horovod()

    def stop_horovod(self) -> None:
        """End Horovod's collectives, since other ranks may wait in them. Not collective."""
        self._is_reset = False
        self._horovod = self._horovod or find_horovod()
        if self._horovod is not None:
            self._horovod.shutdown()

    def go_back(self, error: Exception) -> None:
        """Restore the last commit, unless the training has used up its tries."""
        # First, since a restore needs all ranks, and some may wait in a collective for this
        # one.
        self.stop_horovod()
        commits = commits_of(self._state)
        self._restore()
        self._failures = self._failures + 1 if commits.count == self._commit else 1
        self._commit = commits.count
        if self._failures >= self._tries:
            commits.give_up(self._failures, error)
        logger.log(
            logging.WARNING if commits.ranks.rank == 0 else logging.INFO,
            "went back to commit %d, try %d of %d, after: %s",
            *(commits.count, self._failures, self._tries, error),
        )

    def meet_anew(self) -> None:
        """Start Horovod again, if stopped, and let the state adapt."""
        if self._is_reset:
            return
        commits, chosen = commits_of(self._state), settings()
        commits.meet("starting again")
        if self._horovod is not None:
            # Horovod's own restart forgets its ranks and process sets.
            comm: Any = commits.ranks
            if chosen.process_set is not None:
                comm = self._horovod.global_process_set.mpi_comm
            self._horovod.init(comm=comm, process_sets=list(chosen.process_sets))
        self._state.on_reset()
        self._is_reset = True

    def _restore(self) -> None:
        for _ in range(_MEETINGS):
            try:
                self._state.restore()
            except RollBackError as error:
                # The others did not know of it yet. Now they do, and come here.
                last = error
            else:
                return
        raise last
