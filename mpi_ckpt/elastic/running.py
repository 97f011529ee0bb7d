# SPDX-License-Identifier: Apache-2.0
"""Runs a training that goes on when ranks are lost, if MPI survives that."""

from __future__ import annotations

import gc
import logging
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from mpi_ckpt.comm import is_sign_of_loss, why_lost_ranks_end_the_job
from mpi_ckpt.comm.ulfm import (
    Departure,
    DismissedError,
    await_dismissal,
    count_alike,
    dismiss,
    duplicate,
    form_team,
    greet,
    is_spawned,
    join,
    let_go,
    meet_as_spare,
    meet_at_the_end,
    repair,
)
from mpi_ckpt.elastic.preemption import PreemptionGuard
from mpi_ckpt.errors import CollectiveError, LaunchError, OptionsError
from mpi_ckpt.memory import Memory
from mpi_ckpt.options import ROOT
from mpi_ckpt.storage.notes import Notes

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

    from mpi_ckpt.comm.ulfm import Repaired

__all__ = ["World", "run"]

logger = logging.getLogger(__name__)


AnyComm = TypeVar("AnyComm", bound="MPI.Comm")


@dataclass(frozen=True, slots=True)
class World:
    """The argument of a training in `mpi_ckpt.elastic.run`; each recovery makes a new one.

    Attributes:
        comm: Communicator (mpi4py's) of all live ranks. For the training's own calls and
            for its `CheckpointManager`.
        memory: Copies of the states that outlive a recovery; give it to the manager too.
        failures: How often the job has gone on after losing ranks.
        lost: How many ranks it has lost so far.
        is_replacement: Whether this process came in place of a lost rank, as a new rank or
            as a spare.
        spares: How many spare ranks are left.
    """

    comm: MPI.Intracomm
    memory: Memory
    failures: int = 0
    lost: int = 0
    is_replacement: bool = False
    spares: int = 0
    _watched: list[MPI.Comm] = field(default_factory=list, repr=False)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.size

    def watch(self, comm: AnyComm) -> AnyComm:
        """Register a communicator to be revoked when a rank is lost.

        Not collective. Otherwise a survivor that waits in it, for a rank that waits
        elsewhere, waits for ever.

        Args:
            comm: A communicator made from this world's: a duplicate, a split, a library's
                own.

        Returns:
            The same communicator.
        """
        self._watched.append(comm)
        return comm

    @property
    def watched(self) -> list[MPI.Comm]:
        """The communicators given to `watch`. Not collective."""
        return self._watched


Result = TypeVar("Result")

# A rank may be alone in calling sys.exit(): then it is an error of this rank.
_EXIT_SECONDS = 30.0


def run(
    train: Callable[[World], Result],
    *,
    comm: MPI.Intracomm | None = None,
    replace: bool = False,
    spares: int = 0,
    memory: Memory | None = None,
    max_recoveries: int = 20,
    start_seconds: float = 120.0,
) -> Result:
    """Call a training, and call it again on the live ranks each time ranks are lost.

    Collective. Main thread only. Call it once in a program. A training makes its states and
    its manager, with the world's communicator and memory, restores and goes on. If MPI ends
    the job with a rank (all but Open MPI 5 with ``mpirun --with-ft ulfm``), root logs that
    once, and the training is called only once: use `mpi-ckpt run` there.

    Args:
        train: Called with the `World` of the live ranks. Objects that an earlier call made
            are dropped; objects made outside keep their values at the loss.
        comm: Communicator of mpi4py; it is duplicated. None: all ranks of the job.
        replace: Whether to start new ranks in place of lost ones: each runs this program
            from its beginning, and joins at this call, as one of the last ranks.
        spares: How many of the ranks, the last ones, wait here to take the place of lost
            ones. A spare that was not needed leaves the program with ``sys.exit(0)``.
        memory: Holds the copies of the states; None for one that all ranks hold.
        max_recoveries: After so many recoveries the next loss is an error.
        start_seconds: How long a new rank may take from its start to its call of this; if a
            rank dies just then, this may end other ranks after that time.

    Returns:
        The training's result on this rank, after it has returned on all ranks.

    Raises:
        CollectiveError: On every live rank that trains, after too many losses.
        LaunchError: On the calling rank, if an earlier run lost ranks or let spares go.
        OptionsError: On every rank, if ``spares`` leaves no rank or differs between ranks.
    """
    memory = Memory() if memory is None else memory
    reason = why_lost_ranks_end_the_job()
    if reason:
        return _train_once(train, memory, comm, spares, reason)
    if _DEPARTURE.is_prepared:
        raise LaunchError(
            "an earlier run() lost ranks or let its spares go: call it once in a program"
        )
    if replace or spares:
        memory.lend()
    run = _Run(
        train,
        memory,
        replace=replace,
        max_recoveries=max_recoveries,
        start_seconds=start_seconds,
    )
    return run.go(comm, spares)


def _train_once(
    train: Callable[[World], Result],
    memory: Memory,
    comm: MPI.Intracomm | None,
    spares: int,
    reason: str,
) -> Result:
    """Call a training where MPI ends the job with a rank: nobody can use a spare."""
    handle = duplicate(comm)
    if handle.rank == ROOT:
        logger.warning(
            "a lost rank ends this job: %s; `mpi-ckpt run` restarts such a job", reason
        )
    places = _places_beside(handle, spares)
    team = form_team(handle, places)
    if handle.rank >= places:
        with PreemptionGuard():
            await_dismissal(handle)
        raise SystemExit(0)
    try:
        value = train(World(team, memory, spares=spares))
    except BaseException:
        dismiss(handle, places)
        raise
    if handle.rank == ROOT:
        dismiss(handle, places)
    return value


def _places_beside(handle: MPI.Intracomm, spares: int) -> int:
    """Return how many ranks train. Collective."""
    least, most = count_alike(handle, spares)
    if least != most:
        raise OptionsError(
            f"spares differs between ranks: from {least} to {most}; give all the same"
        )
    if not 0 <= spares < handle.size:
        raise OptionsError(
            f"spares={spares} of a job of {handle.size} ranks: at least 0, and one rank at "
            "least trains; start the job with as many ranks more as it has spares"
        )
    return handle.size - spares


@dataclass(frozen=True, slots=True)
class _AttemptEnd(Generic[Result]):
    """How a call of the training ended on this rank: it returned, left, or lost ranks.

    Attributes:
        value: What the training returned.
        leaving: The exit by which this rank left it; every spare leaves by one.
        loss: The error that came from a lost rank.
        is_over: Whether all ranks have ended.
    """

    value: Result | None = None
    leaving: SystemExit | None = None
    loss: Exception | None = None
    is_over: bool = False


class _Run(Generic[Result]):
    """One run: the calls of the training, and the recoveries between them."""

    def __init__(
        self,
        train: Callable[[World], Result],
        memory: Memory,
        *,
        replace: bool,
        max_recoveries: int,
        start_seconds: float,
    ) -> None:
        self._train = train
        self._memory = memory
        self._replace = replace
        self._max_recoveries = max_recoveries
        self._start_seconds = start_seconds
        self._places = 0
        self._failures = 0
        self._lost = 0
        self._has_new = False
        self._was_spare = False

    def go(self, comm: MPI.Intracomm | None, spares: int) -> Result:
        """Call the training until it has ended on all ranks."""
        handle, team = self._begin(comm, spares)
        while True:
            watched: list[MPI.Comm] = [team]
            ending = self._wait_or_attempt(handle, team, watched)
            seen = time.monotonic()
            if ending.is_over:
                _DEPARTURE.prepare_if_lost(handle)
                return self._end(handle, ending)
            _DEPARTURE.prepare(handle, watched)
            let_go(handle, watched)
            if ending.loss is not None:
                meet_at_the_end(handle, done=False)
            if self._failures >= self._max_recoveries:
                raise self._too_many(ending)
            repaired = self._recover(handle, seen)
            handle, team = repaired.handle, repaired.team
            _DEPARTURE.prepare(handle, [])
            _forget(ending.loss)

    def _begin(
        self, comm: MPI.Intracomm | None, spares: int
    ) -> tuple[MPI.Intracomm, MPI.Intracomm]:
        if is_spawned():
            handle, numbers = join()
            _DEPARTURE.prepare(handle, [])
            self._places, self._failures, self._lost = numbers
            return handle, handle
        handle = duplicate(comm)
        self._places = _places_beside(handle, spares)
        self._was_spare = handle.rank >= self._places
        return handle, form_team(handle, self._places)

    def _wait_or_attempt(
        self, handle: MPI.Intracomm, team: MPI.Intracomm, watched: list[MPI.Comm]
    ) -> _AttemptEnd[Result]:
        """Train on a rank of the team, wait on a spare; all meet if none lost ranks."""
        places = min(self._places, handle.size)
        if handle.rank >= places:
            return self._wait(handle, places)
        world = World(
            team,
            self._memory,
            self._failures,
            self._lost,
            is_spawned() or self._was_spare,
            handle.size - places,
        )
        try:
            ending = self._attempt(world)
        except BaseException:
            # Nobody will meet the spares.
            dismiss(handle, places)
            if places < handle.size:
                # One may be lost, and this rank need not have heard of it.
                _DEPARTURE.prepare(handle, [])
            raise
        watched += world.watched
        if ending.loss is not None:
            return ending
        seconds = None if ending.leaving is None else _EXIT_SECONDS
        is_over = meet_at_the_end(handle, done=True, seconds=seconds, places=places)
        return _AttemptEnd(ending.value, ending.leaving, is_over=is_over)

    def _wait(self, handle: MPI.Intracomm, places: int) -> _AttemptEnd[Result]:
        try:
            # Signals that ask all ranks for a save and a stop are for those that train.
            with PreemptionGuard():
                is_over = meet_as_spare(handle, places)
        except DismissedError:
            _DEPARTURE.prepare(handle, [])
            is_over = True
        return _AttemptEnd(leaving=SystemExit(0), is_over=is_over)

    def _attempt(self, world: World) -> _AttemptEnd[Result]:
        try:
            if self._has_new:
                self._has_new = False
                greet(world.comm, (self._places, self._failures, self._lost))
            return _AttemptEnd(value=self._train(world))
        except SystemExit as leaving:
            return _AttemptEnd(leaving=leaving)
        except Exception as error:
            if not is_sign_of_loss(error, world.comm):
                raise
            return _AttemptEnd(loss=error)

    def _recover(self, handle: MPI.Intracomm, seen: float) -> Repaired:
        before = min(self._places, handle.size)
        repaired = repair(
            handle,
            newest=self._memory.age,
            places=self._places,
            replace=self._replace,
            start_seconds=self._start_seconds,
        )
        self._failures += 1
        self._lost += len(repaired.lost)
        self._has_new = repaired.spawned > 0
        if repaired.handle.rank == ROOT:
            size = repaired.team.size
            survivors = before - sum(rank < before for rank in repaired.lost)
            came = size - repaired.spawned - survivors
            logger.warning(
                "lost rank(s) %s of %d; going on with %d, %d of them new, after %.2f s%s",
                ", ".join(map(str, repaired.lost)) or "none",
                handle.size,
                size,
                repaired.spawned,
                time.monotonic() - seen,
                f"; {came} of them spares until now" if came else "",
            )
        return repaired

    def _too_many(self, ending: _AttemptEnd[Result]) -> BaseException:
        if ending.leaving is not None and self._was_spare:
            return ending.leaving
        error = CollectiveError(
            f"ranks were lost {self._failures + 1} times, max_recoveries is "
            f"{self._max_recoveries}; published generations are untouched"
        )
        error.__cause__ = ending.loss
        return error

    def _end(self, handle: MPI.Intracomm, ending: _AttemptEnd[Result]) -> Result:
        if ending.leaving is not None:
            _DEPARTURE.leave_by(ending.leaving)
            raise ending.leaving
        if self._failures and handle.rank == ROOT:
            # Managers that lost ranks left open have noted no end.
            Notes.from_environment().add("survived", losses=self._lost)
        return ending.value  # type: ignore[return-value]


_DEPARTURE = Departure()


def _forget(loss: BaseException | None) -> None:
    """Release the objects of the training: its states may fill the memory."""
    # Not before the repair: until then MPI may still write to their buffers.
    pending, seen = [loss], set[int]()
    while pending:
        cause = pending.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            traceback.clear_frames(cause.__traceback__)
            pending += [cause.__cause__, cause.__context__]
            cause.__traceback__ = None
    gc.collect()
