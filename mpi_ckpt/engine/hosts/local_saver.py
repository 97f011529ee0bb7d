# SPDX-License-Identifier: Apache-2.0
"""Begins local saves, counts their failures, and switches them off after three in a row."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from mpi_ckpt.engine.hosts.local_save import LocalSave, parts_on_hosts
from mpi_ckpt.engine.save.pending import PendingSave
from mpi_ckpt.errors import (
    CheckpointError,
    DivergedError,
    OptionsError,
    SaveError,
    StageError,
    StateMismatchError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mpi_ckpt.engine.hosts.level import HostLevel
    from mpi_ckpt.engine.save.saver import Saver
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.steps.stepping import StepActions, Steps
    from mpi_ckpt.reports import SaveReport

logger = logging.getLogger(__name__)


class LocalSaver:
    """Makes the local saves of a manager. Main thread only.

    A failed one is logged and counted, and the training goes on: only what a save to the
    directory would refuse too is an error here.

    Args:
        session: The manager's.
        saver: The manager's, which keeps the pending save of either level.
        steps: The manager's.
    """

    def __init__(self, session: Session, saver: Saver, steps: Steps) -> None:
        self._session = session
        self._saver = saver
        self._steps = steps

    def save(
        self,
        step: int,
        *,
        metrics: Mapping[str, float] | None,
        sync: bool | None,
        only: Collection[str] | None,
    ) -> SaveReport | PendingSave:
        """Save to the hosts, once no save is pending.

        Collective.

        Args:
            step: Training step to note.
            metrics: The program's metrics.
            sync: As for a save to the directory; a local save needs a sync.
            only: None: a local save is of all states.

        Raises:
            OptionsError: On every rank, if the manager has no local level, two hosts see
                one directory, or a state cannot be kept.
            CheckpointError: On every rank, as a save to the directory does before it
                writes.
        """
        session, saver = self._session, self._saver
        level = session.hosts
        syncs = session.options.sync if sync is None else sync
        if level is None or not syncs or only is not None:
            raise OptionsError(
                'save(level="local") needs a manager that was given local=Local(...), a '
                "sync, and all states"
            )
        saver.finish_pending()
        drain = level.drain
        if drain is not None:
            drain.raise_failure()
        is_copied = drain is not None and not level.is_off and drain.take_wish()
        self._steps.restart_local()
        with session.watch("saving to hosts") as clock:
            apart = partial(parts_on_hosts, session)
            work = saver.work_on_states(None, step, metrics, syncs=True, apart=apart)
            begun = saver.registry.begin("beginning a save", None, work, error=SaveError)
            states, shop = begun.result, saver.workshop
            save = LocalSave(
                *(session, level, shop, states),
                step=step,
                metrics=metrics,
                clock=clock,
                is_copied=is_copied,
            )
            if level.is_off:
                return save.settled()
            save.sync()
            self._attempt(save, level)
            if is_copied:
                saver.durations.note_save(clock.seconds()["total"])
            if save.report is None and session.options.asynchronous:
                saver.pending = PendingSave(session.comm, save, "local")
                return saver.pending
            if save.report is None:
                save.publish()
                save.prune()
            return save.settled()

    def go_on(self, actions: StepActions) -> None:
        """Finish what all ranks have written or copied by this step.

        Collective. Before a stop a copy to the directory is given up: the last save comes
        in its place, and at once.

        Args:
            actions: What the ranks have agreed to do at this step.

        Raises:
            CheckpointError: On every rank, if a pending save has failed, or another job has
                taken over the directory.
        """
        drain = None if self._session.hosts is None else self._session.hosts.drain
        if actions.stop or actions.finish:
            self._saver.finish_pending()
        if drain is not None and actions.stop:
            drain.give_up(self._session)
        elif drain is not None and actions.copy:
            drain.go_on(self._session, self._saver.workshop)

    def settle(self) -> None:
        """Remove the local generations of a training that has ended well. Collective."""
        if self._session.hosts is not None:
            self._session.hosts.settle(self._session)

    def _attempt(self, save: LocalSave, level: HostLevel) -> None:
        """Do what may fail on a host, up to the writing. Collective."""
        try:
            level.open(self._session, makes=True)
            save.place()
        except (OptionsError, StageError):
            raise  # a fault of the program, not of a host
        except CheckpointError as error:
            save.fail(error)
            return
        try:
            save.write()
        except (DivergedError, StateMismatchError):
            save.drop()
            raise
        except CheckpointError as error:
            save.fail(error)
