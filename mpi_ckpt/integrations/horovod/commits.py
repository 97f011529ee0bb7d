# SPDX-License-Identifier: Apache-2.0
"""Commits an elastic state: to memory each time, to disk as the options say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.comm import Communicator, agree, any_of, compare_texts
from mpi_ckpt.errors import (
    CheckpointError,
    CollectiveError,
    NoCheckpointError,
    OptionsError,
    RegistrationError,
)
from mpi_ckpt.integrations.horovod.interrupts import RollBackError
from mpi_ckpt.integrations.horovod.settings import settings
from mpi_ckpt.manager import CheckpointManager
from mpi_ckpt.memory import Memory

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_ckpt.integrations.horovod.settings import Settings
    from mpi_ckpt.integrations.horovod.tracked import Tracked
    from mpi_ckpt.state import State


class Commits:
    """The manager of an elastic state, made when the ranks first meet.

    Collective, as is every method unless it says otherwise. Main thread only.

    Args:
        tracked: The tracked attributes.

    Attributes:
        count: Number of commits, over all runs.
    """

    def __init__(self, tracked: Tracked) -> None:
        self._tracked = tracked
        self._comm: Communicator | None = None
        self._manager: CheckpointManager | None = None
        self._memory: Memory | None = None
        self._known: list[State] = []
        self._is_synced = False
        self._notices = self._heard = 0
        self.count = 0

    @property
    def ranks(self) -> MPI.Intracomm:
        """Communicator of the ranks between `open` and their parting. Not collective."""
        assert self._comm is not None
        return self._comm.handle

    def note_hosts_updated(self) -> None:
        """Make the ranks meet again at the next commit. Not collective. Thread-safe."""
        self._notices += 1

    def open(self) -> None:
        """Bring the ranks together, if they have not met yet.

        Raises:
            CheckpointError: On every rank, as `CheckpointManager` does, or if there is no
                directory.
        """
        if self._comm is not None:
            return
        chosen = settings()
        if self._memory is None and chosen.memory is not None:
            self._memory = Memory(holders=chosen.memory, every=1)
        with chosen.training_ranks() as ranks:
            self._comm, self._manager = self._bring_together(ranks, chosen)

    def _bring_together(
        self, ranks: MPI.Intracomm, chosen: Settings
    ) -> tuple[Communicator, CheckpointManager]:
        comm = Communicator(ranks, deadline_seconds=chosen.first_deadline_seconds)
        try:
            directory, options = agree(
                comm,
                "reading the settings",
                lambda: (chosen.find_directory(), chosen.find_options()),
                error=OptionsError,
            )
            comm.set_limits(deadline_seconds=options.deadline_seconds)
            _compare(comm, self._tracked)
            self._known = self._tracked.states()
            manager = CheckpointManager(
                directory, self._known, comm=ranks, options=options, memory=self._memory
            )
        except CheckpointError:
            comm.close()
            raise
        return comm, manager

    def commit(self, doing: str, *, durable: bool) -> bool:
        """Commit; return whether the ranks must meet again.

        Args:
            doing: The call of the program, the same on every rank.
            durable: Whether it must be on disk when this returns.

        Raises:
            SystemExit: On every rank, after a request to stop: all is on disk.
            CheckpointError: On every rank, if it failed on any.
        """
        manager, updated = self.meet(doing)
        if not self._is_synced:
            raise CheckpointError(
                f"{doing} before the first sync(): the commits of earlier runs would be "
                "ignored; nothing was committed. Call sync() once at the start, as run() "
                "does"
            )
        stop = manager.step()
        self.count = manager.steps
        if stop:
            raise SystemExit(manager.exit_code)
        if durable:
            manager.save().wait()
        return updated

    def check(self, doing: str) -> bool:
        """Stop if requested; return whether the ranks must meet again.

        Raises:
            SystemExit: On every rank, after a request to stop: all is on disk.
            CheckpointError: On every rank, if it failed on any.
        """
        manager, updated = self.meet(doing)
        if manager.should_stop() and self._is_synced:
            manager.step()  # which saves
            raise SystemExit(manager.exit_code)
        return updated

    def restore(self, doing: str) -> None:
        """Go back to the last commit.

        Raises:
            NoCheckpointError: On every rank, if there is none.
            CheckpointError: On every rank, for any other failure.
        """
        manager, _ = self.meet(doing)
        if manager.restore() is None:
            raise NoCheckpointError(
                f"{doing}: nothing was committed yet, in this run or an earlier one; "
                "nothing was changed"
            )
        self.count = manager.steps

    def sync(self, doing: str) -> None:
        """Make all ranks equal to root, and that the last commit.

        The first call in a process gives root the contents of the last durable commit.

        Raises:
            CheckpointError: On every rank, if it failed on any.
        """
        manager, _ = self.meet(doing)
        if not self._is_synced:
            manager.restore()
            self.count = manager.steps
        manager.sync()
        # Equal samplers receive nothing in a sync; in Horovod it divides the rest anyway.
        self._tracked.place(self.ranks)
        if self._memory is not None:
            manager.remember()
        else:
            manager.save().wait()
        self._is_synced = True

    def finish(self) -> None:
        """Commit durably, and release the ranks.

        Raises:
            CheckpointError: On every rank, if it failed on any.
        """
        if self._manager is None or self._comm is None:
            return
        manager, _ = self.meet("close()")
        if self._is_synced:
            manager.save().wait()
        manager.close()
        self._comm.close()
        self._manager = self._comm = None

    def leave(self, error: BaseException) -> None:
        """Release the ranks after an error, maybe of one rank. Not collective."""
        if self._manager is not None:
            self._manager.__exit__(type(error), error, error.__traceback__)
            # MPI_Finalize frees the communicator. The states may hold half a step now: a
            # program that goes on with them starts from the last commit.
            self._manager = self._comm = None
            self._is_synced = False

    def give_up(self, times: int, error: BaseException) -> None:
        """Raise the failure of each rank.

        Args:
            times: How often it has failed.
            error: The exception that this rank has caught.

        Raises:
            CollectiveError: On every rank.
        """
        assert self._comm is not None
        kept = f"the states hold commit {self.count}"

        def fail() -> None:
            raise error

        doing = f"training on from one commit, {times} times in a row,"
        agree(self._comm, doing, fail, error=CollectiveError, safe=kept)

    def meet(self, doing: str) -> tuple[CheckpointManager, bool]:
        """Check that all ranks are in the same call, with the same attributes.

        Returns:
            The manager, and whether any rank wants all to meet again.

        Raises:
            RollBackError: On every rank, if they are in different calls.
            RegistrationError: On every rank, if their attributes differ.
            CheckpointError: On every rank, if they cannot meet.
        """
        self.open()
        comm, manager = self._comm, self._manager
        assert comm is not None and manager is not None  # noqa: PT018
        notices = self._notices
        try:
            (updated,) = any_of(comm, doing, notices != self._heard)
        except CollectiveError as error:
            if comm.is_broken:
                raise
            # All ranks know of it: all can go back to the last common commit.
            raise RollBackError(str(error), problems=error.problems) from error
        self._heard = notices
        _compare(comm, self._tracked)
        self._take_in(manager)
        return manager, updated

    def _take_in(self, manager: CheckpointManager) -> None:
        states = self._tracked.states()
        if states != self._known:
            for name in manager.names:
                manager.remove(name)
            for state in states:
                manager.add(state)
            self._known = states


def _compare(comm: Communicator, tracked: Tracked) -> None:
    problems = compare_texts(comm, "comparing the attributes", tracked.describe())
    if problems:
        raise RegistrationError(
            "the ranks track different attributes, or of different kinds; nothing was "
            "changed:\n  " + "\n  ".join(problems),
            problems=problems,
        )
