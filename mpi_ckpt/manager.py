# SPDX-License-Identifier: Apache-2.0
"""The manager: calls the parts of a save and of a restore in order, and nothing else.

save      sync the states, stage a copy, write .partial-N, publish checkpoint-N, prune
restore   find the newest good generation, match it, transfer it to every rank, adopt it
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.choice import Choice
from mpi_ckpt.engine.abort import AbortOnError
from mpi_ckpt.engine.hosts.level import HostLevel
from mpi_ckpt.engine.hosts.local_saver import LocalSaver
from mpi_ckpt.engine.registry import Registry
from mpi_ckpt.engine.restore.newest import list_generations
from mpi_ckpt.engine.restore.restoring import Restore
from mpi_ckpt.engine.save.saver import Saver
from mpi_ckpt.engine.session import Session
from mpi_ckpt.engine.steps.stepping import Steps
from mpi_ckpt.engine.sync.replicas import sync_states
from mpi_ckpt.errors import OptionsError
from mpi_ckpt.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from os import PathLike

    from mpi4py import MPI

    from mpi_ckpt.engine.hosts.local_settings import Local
    from mpi_ckpt.engine.restore.restoring import OnResize
    from mpi_ckpt.engine.save.pending import PendingSave
    from mpi_ckpt.memory import Memory
    from mpi_ckpt.reports import GenerationInfo, RestoreReport, SaveReport, SyncReport
    from mpi_ckpt.retention import Mode
    from mpi_ckpt.state import State

__all__ = ["CheckpointManager"]


class CheckpointManager(AbstractContextManager["CheckpointManager"]):
    """Saves and restores the states of an MPI job.

    Collective, as is every method unless it says otherwise: all ranks of the
    communicator call it, in the same order. Main thread only. A context manager.

    Args:
        root: Directory of the generations; the first save makes it. Only root need see it.
        states: The states, with the same names in the same order on every rank.
        comm: Communicator of mpi4py, which is duplicated. None: all ranks of the job.
        options: The options; the same on every rank.
        memory: Saves leave a copy in it; `restore` uses that copy first.
        local: Where hosts keep frequent saves: docs/local.md.

    Raises:
        LaunchError: On every rank, if launcher and MPI disagree about the job.
        OptionsError: On every rank, if the options differ between ranks.
        RegistrationError: On every rank, if names collide or differ between ranks.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        states: Iterable[State] = (),
        *,
        comm: MPI.Intracomm | None = None,
        options: Options | None = None,
        memory: Memory | None = None,
        local: Local | None = None,
    ) -> None:
        options = options or Options()
        hosts = None if local is None else HostLevel.over(local, options, memory)
        session = self._session = Session.begin(root, comm, options, memory, hosts)
        self._registry = Registry(session.comm)
        self._step = 0
        self._pinned: int | None = None
        self._saver = Saver(session, self._registry)
        self._steps = Steps(session, self._saver)
        self._local = LocalSaver(session, self._saver, self._steps)
        self._abort = AbortOnError(session.comm, self._saver.close, options.abort_on_error)
        with session.let_go_of_if_refused():
            session.compare_options()
            self._registry.add_all(states)
            self._steps.read_environment()
        self._abort.arm()
        session.note("started", self._step)
        self._steps.watch_signals()

    @property
    def steps(self) -> int:
        """Training steps done: calls of `step`, over all runs. Not collective."""
        return self._step

    @property
    def is_root(self) -> bool:
        """Whether this rank is root, which commits. Not collective."""
        return self._session.comm.is_root

    @property
    def names(self) -> list[str]:
        """The names of the states, in saving order. Not collective."""
        return self._registry.names

    @property
    def last_save(self) -> SaveReport | None:
        """The last acknowledged save of this manager; None before. Not collective."""
        return self._session.observer.last_save

    @property
    def exit_code(self) -> int:
        """0, or ``StopWhen.exit_code`` after a request to stop. Not collective."""
        return self._session.options.stop.exit_code if self._steps.must_stop else 0

    def add(self, state: State) -> None:
        """Add a state. Not collective, but all ranks must add it before they save.

        Raises:
            RegistrationError: On the calling rank, if it is no state, or its name is taken.
        """
        self._registry.add(state)

    def remove(self, name: str) -> None:
        """Remove a state. Not collective, but all ranks must remove it before they save.

        Raises:
            RegistrationError: On the calling rank, if there is no such state.
        """
        self._registry.remove(name)

    def sync(self, only: Collection[str] | None = None) -> SyncReport:
        """Make the states equal on all ranks, with root's values, without saving.

        Collective. For the start. Makes checked states equal too; root warns of it.

        Args:
            only: Names of the states to sync; None for all.

        Raises:
            CheckpointError: On every rank, as `save` does before it writes.
        """
        states = self._registry.choose("beginning a sync", only)
        comm, options = self._session.comm, self._session.options
        return sync_states(comm, states, options, forced=True).report

    def save(
        self,
        step: int | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        only: Collection[str] | None = None,
        carry: Callable[[str], bool] | None = None,
        sync: bool | None = None,
        level: Literal["directory", "local"] = "directory",
    ) -> SaveReport | PendingSave:
        """Sync the states, write them as one new generation, publish it durably.

        Collective. When it returns, on any rank, the generation survives a power cut; with
        ``Options.asynchronous``, once ``wait()`` of its result has returned. Of a local
        save, `SaveReport` says what it survives, and whether it failed.

        Args:
            step: Training step to note; None for the manager's own count.
            metrics: Any floats, finite or not; for `KeepBest` and for you.
            only: Names of the states to save; the others are taken from the newest
                generation, or the one restored. None: all whose ``skip`` is false.
            carry: With ``only``: root asks it, by name, which others to take; None: all.
            sync: Whether to make the replicas equal first; None: as in the options.
            level: ``"local"`` saves to the hosts: all states, after a sync.

        Raises:
            CheckpointError: On every rank, if any failed; a SaveError published nothing.
        """
        step = self._step if step is None else step
        if level not in ("directory", "local"):
            raise OptionsError(f"level={level!r}: 'directory' or 'local'")
        if level == "local":
            return self._local.save(step, metrics=metrics, sync=sync, only=only)
        if (instead := self._saver.make_way()) is not None:
            return instead
        with self._session.watch("saving") as clock:
            save = self._saver.begin(only, step, sync, metrics, carry, clock)
            save.sync()
            self._pinned = None
            self._steps.restart()
            save.stage()
            save.write()
            if self._session.options.asynchronous:
                return self._saver.leave(save)  # published and pruned when ranks next meet
            save.publish()
            save.prune()
            return self._saver.end(save)

    def remember(self, step: int | None = None) -> None:
        """Copy the states into the `Memory`, without a sync and without a save.

        Collective. First waits for a pending save, which is written from that memory.

        Args:
            step: Training step to note; None for the manager's own count.

        Raises:
            CheckpointError: On every rank, if any fails; that rank then holds no copy.
        """
        self._saver.finish_pending()
        self._saver.remember(self._step if step is None else step)

    def restore(
        self,
        only: Collection[str] | None = None,
        *,
        generation: int | None = None,
        step: int | None = None,
        best: str | None = None,
        mode: Mode | None = None,
        on_resize: OnResize | None = None,
    ) -> RestoreReport | None:
        """Bring the states back to the newest generation that verifies, or to another.

        Collective. If root holds a copy in the `Memory`, that comes first. A bad generation
        is quarantined, with a warning by root, and the next older one is used; but nothing
        replaces a generation that was asked for. Nothing here draws from random streams.

        Args:
            only: Names of the states to restore; None for all. Several partial restores in
                a row use one generation, which is first proven as a whole.
            generation: Number of the generation; newer ones stay: docs/restart.md.
            step: Or the step it was saved at; the newest if several match.
            best: Or the metric by which it is the best.
            mode: Which value is best: ``"min"`` or ``"max"``; None: that of a `KeepBest`.
            on_resize: Called last, on every rank, if another number of ranks saved, with
                that number and the present one. Must not communicate.

        Returns:
            The report; None, with nothing changed, if nothing was ever saved here.

        Raises:
            StateMismatchError: On every rank, with all mismatches; nothing has changed.
            NoCheckpointError: On every rank, if there is no such generation.
            CorruptGenerationError: On every rank, if none, or not that one, is good.
            CheckpointError: On every rank, for anything else, such as another format.
        """
        self._saver.finish()
        args = self._session, self._registry, only, Choice(generation, step, best, mode)
        with self._session.watch("restoring") as clock:
            restore = Restore(*args, pinned=self._pinned, clock=clock)
            while restore.find():
                with restore.quarantine_if_bad():
                    restore.match()
                    restore.transfer()
                    restore.adopt()
        if (report := restore.report) is not None:
            self._step = report.step
            self._pinned = None if only is None else report.generation
            self._steps.note_restored(report, args[-1])
        self._session.observer.note_restore(report)
        restore.report_resize(on_resize)
        return report

    def step(self, *, metrics: Mapping[str, float] | None = None) -> bool:
        """Count a training step; save if a save is due or a stop was requested.

        Collective. Call at every step boundary. Costs one allreduce of 56 bytes. Short
        steps do not wait for it: they notice a request to stop one step later.

        Args:
            metrics: Given to the save, if there is one.

        Returns:
            Whether to stop: a rank got a signal, the job is about to end, or
            ``Options.stop`` asks; all is saved. Leave by ``sys.exit(manager.exit_code)``.

        Raises:
            CheckpointError: On every rank, as `save` does.
        """
        self._step += 1
        actions = self._steps.decide(self._step)
        self._local.go_on(actions)
        if actions.stop:
            kept = self.save(metrics=metrics, level=actions.last).wait()
            self._steps.note_stop(kept if kept.generation else self.save().wait())
        elif actions.save:
            self.save(metrics=metrics)
        elif actions.local:
            self.save(metrics=metrics, level="local")
        elif actions.remember:
            self.remember()
        self._steps.go_on()
        return actions.stop

    def should_stop(self) -> bool:
        """Return whether a stop was requested; count no step and save nothing.

        Collective, and raises, like `step`, which saves and returns True the next time: for
        evaluation and warm-up, which may end early. `exit_code` is already set.
        """
        return self._steps.should_stop()

    def busy(
        self, reason: str, *, at_most_seconds: float = 3600.0
    ) -> AbstractContextManager[None]:
        """Announce that this rank is late, and why: the others wait. Not collective.

        ``with manager.busy("writing VTK"):`` around slow work, on the ranks that do it: no
        deadline passes meanwhile. Costs a short message to each rank at start and end.

        Args:
            reason: The waiting ranks report it.
            at_most_seconds: The others wait at most so long, less if they see it die.

        Raises:
            CheckpointError: On the calling rank, in another thread or a forked process.
        """
        return self._session.comm.busy_ranks.occupied(reason, at_most_seconds)

    def wait(self) -> None:
        """Return when no save is pending; raise its error on every rank. Collective."""
        self._saver.finish()

    def generations(self) -> list[GenerationInfo]:
        """Return all generations, oldest first; raise if root cannot. Collective."""
        self._saver.finish()
        return list_generations(self._session)

    def close(self) -> None:
        """Finish a pending save; release directory, signals and communicator.

        Collective. Callable twice. Raises like `wait`, and releases the rest all the same.
        Unless a stop was requested, `mpi-ckpt run` learns that the training is done.
        """
        try:
            self._saver.finish()
            self._local.settle()
            self._session.note_end(self._step)
        finally:
            # All ranks agreed on the error, if any: every rank is here.
            self._steps.retire()
            self._saver.let_go()
            self._steps.settle()
            self._session.close()
            self._abort.disarm()

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is None:
            self.close()
            return
        # INVARIANT: one rank alone may be here: no collective; MPI_Finalize frees all.
        self._abort.note(error, expected=self.exit_code)
        self._session.note_end(self._step, error, unsaved=bool(self._saver.pending))
        self._steps.retire()
        self._saver.let_go()
