# SPDX-License-Identifier: Apache-2.0
"""Makes the ranks agree on what to do at a step, without making the training wait.

A rank posts a vote at the end of one step and reads it at the next, so that no rank waits:
all ranks act on an event at the end of the step after it. Compared with long steps a vote
costs nothing, so there it is held at once.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.comm import Vote, any_of, collect, on_root
from mpi_ckpt.elastic.preemption import PreemptionGuard
from mpi_ckpt.elastic.requests import StopRequests, fits
from mpi_ckpt.engine.steps.interval import Interval
from mpi_ckpt.errors import CheckpointError, CollectiveError, OptionsError
from mpi_ckpt.pacing import ASSUMED, AutoInterval, Failures, count_failures
from mpi_ckpt.reports import StopReport

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpi_ckpt.choice import Choice
    from mpi_ckpt.engine.hosts.copying.drain import Drain
    from mpi_ckpt.engine.save.saver import Saver
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import RestoreReport, SaveReport

logger = logging.getLogger(__name__)


_REASONS_MAX = 4


def join_reasons(parts: Sequence[bytes]) -> str:
    """Return the reasons of all ranks in words; a few at most. Not collective."""
    reasons = [part.decode() for part in parts if part]
    more = len(reasons) - _REASONS_MAX
    cut = "; ".join(reasons[:_REASONS_MAX])
    return f"{cut} and {more:,} more ranks" if more > 0 else cut


def only_on_hosts(place: str, root: Path) -> str:
    """Return what to do about a last save that hosts alone keep. Not collective.

    Args:
        place: The path of the local level.
        root: The checkpoint directory.
    """
    return (
        " on the hosts alone, as a save to the directory would not be durable before the "
        f"job ends. A restart on these hosts finds it; `mpi-ckpt rescue {place} {root}`, "
        "one process on each of them, copies it to the directory"
    )


@dataclass(frozen=True, slots=True)
class StepActions:
    """What to do at the end of a step, the same on every rank.

    Attributes:
        stop: Save, then stop.
        save: A save is due.
        finish: All ranks have written a pending save; it can be acknowledged.
        remember: A copy in memory is due, and no save is being written from the previous
            one.
        local: A save to the hosts is due, and no save is pending once ``finish`` was done.
        copy: All hosts have copied a generation to the directory, or should try again.
        last: Where the last save goes before a stop: to the hosts if it fits nowhere else.
    """

    stop: bool
    save: bool
    finish: bool
    remember: bool
    local: bool
    copy: bool
    last: Literal["directory", "local"] = "directory"


_STOP, _DUE, _WRITING, _LONG, _LOCAL, _COPYING, _TRY, _FAILED = (
    1 << bit for bit in range(8)
)

# An allreduce is less than a hundredth of such a step.
_LONG_STEP_SECONDS = 0.05


class Steps:
    """Agrees at every step on what to do. Main thread only.

    Its methods are collective, unless they say otherwise.

    Args:
        session: The manager's.
        saver: Keeps the pending save, and the cost of saves.
    """

    def __init__(self, session: Session, saver: Saver) -> None:
        self._session = session
        self._saver = saver
        signals = session.options.preemption_signals
        self._guard = PreemptionGuard(signals, tells=session.comm.is_root)
        self._vote = Vote(session.comm, "step()")
        self._requests: StopRequests | None = None
        if session.comm.is_root:
            root = session.directory.root
            self._requests = StopRequests(session.options.stop, root)
        every = session.options.interval
        self._every = AutoInterval() if every == "auto" else every
        self._interval = Interval(self._every, saver.durations)
        local = None if session.hosts is None else session.hosts.local.every
        self._local = Interval(local, saver.durations)
        if self._drain is not None:
            session.observer.copying = self._drain.progress
        self._is_local_due = False
        self._turn = 0  # the number of saves and restores so far
        self._posted_in = (0, 0)
        self._is_long = False
        self._is_agreed = False
        self._reason = ""
        self._why = ""
        self._fits = True
        self._has_warned_of_displaced = False
        self._counted = 0  # steps since the last save or restore
        self._has_warned_of_lost = False
        self._guard.is_heeded = False

    @property
    def must_stop(self) -> bool:
        """Whether to stop: by agreement, or by a request on this rank. Not collective."""
        return self._is_agreed or self._guard.requested

    def watch_signals(self) -> None:
        """Start to watch for the signals of the options, if any. Not collective."""
        if self._session.options.preemption_signals and not self._guard.install():
            logger.warning("signals are not watched: this is not the main thread")

    def retire(self) -> None:
        """Stop watching for signals. Not collective."""
        self._guard.retire()

    def read_environment(self) -> None:
        """Find out when the job ends.

        Collective.

        Raises:
            OptionsError: On every rank, if root's MPI_CKPT_DEADLINE is no point in time.
        """

        def read() -> None:
            if self._requests is not None:
                self._requests.read_environment()

        doing = "looking for the end of the job"
        on_root(self._session.comm, doing, read, error=OptionsError)

    def restart(self) -> None:
        """Note that a save begins or a restore has ended. Not collective.

        No save is pending: the main thread may use the directory.
        """
        if self._turn == 0 and self._session.comm.is_root:
            self._interval.failures = self._known_failures()
        self._warn_of_displaced()
        self._interval.restart()
        self.restart_local()
        if (drain := self._drain) is not None:
            drain.note_written()

    def note_restored(self, report: RestoreReport, choice: Choice) -> None:
        """Note that a restore has ended; warn once if it undid steps. Not collective.

        Args:
            report: Its report.
            choice: What the program has asked for.
        """
        # From memory a recovery goes back; what was asked for by number was meant.
        is_told = self._has_warned_of_lost or report.from_memory or not choice.is_newest
        if self._counted and self._session.comm.is_root and not is_told:
            self._has_warned_of_lost = True
            logger.warning(
                "restore() went to step %d of generation %d: %d steps that step() has "
                "counted since the last save or restore are undone. If that was not meant, "
                "call restore() once, before the training; to go back without this "
                "warning, restore(generation=%d)",
                report.step,
                report.generation,
                self._counted,
                report.generation,
            )
        self.restart()

    def restart_local(self) -> None:
        """Note that a save to the hosts begins. Not collective. No save is pending."""
        self._turn += 1
        self._counted = 0
        self._local.restart()
        self._is_local_due = False
        self._saver.durations.restart_step(time.monotonic())

    def decide(self, step: int) -> StepActions:
        """Agree on what to do at the end of a step; then do it, and call `go_on`.

        Collective. Durations one allreduce of 56 bytes, usually posted a step ago.

        Args:
            step: Steps done.

        Raises:
            CollectiveError: On every live rank, if a rank never arrives or is in another
                call.
        """
        self._counted += 1
        self._saver.durations.note_step(time.monotonic())
        if self._drain is not None:
            self._drain.step = step
        self._session.observer.note_step(step, self._interval.next_due(step))
        self._guard.is_heeded = True
        self._session.comm.call = "step()"
        if self._vote.is_posted:
            flags, turn = self._vote.take().flags, self._posted_in
        else:
            flags, turn = self._vote.exchange(self._flags()).flags, self._turns
        self._agree_to_stop(wanted=bool(flags & _STOP))
        self._is_long = bool(flags & _LONG)
        # A vote from before the last save cannot decide on the next save, or on whether it
        # is written. The turn is the same on every rank.
        is_fresh = turn[0] == self._turn
        memory, pending = self._session.memory, self._saver.pending is not None
        finish = pending and is_fresh and not flags & _WRITING
        # A local save that is due waits for the pending one, not the training for both;
        # but one that is due in the directory is of this step, with its metrics.
        self._is_local_due |= self._local.is_due_at(step)
        self._is_local_due |= is_fresh and bool(flags & _LOCAL)
        is_due = self._interval.is_due_at(step) or (is_fresh and bool(flags & _DUE))
        is_due = self._is_due_in_directory(step, is_due=is_due)
        hosts = self._session.hosts
        is_on = hosts is not None and not hosts.is_off
        is_wanted = self._drain is not None and self._drain.is_wanted
        return StepActions(
            stop=self._is_agreed,
            save=is_due,
            finish=finish,
            remember=memory is not None and memory.is_due(step) and not pending,
            local=is_on and self._is_local_due and (finish or not pending or is_wanted),
            copy=self._must_go_on_copying(flags, is_fresh=turn[1] == self._turns[1]),
            last="directory" if self._fits or not is_on else "local",
        )

    def go_on(self) -> None:
        """Post the vote for the next step, unless votes are held at once or not needed.

        Collective. Returns at once.
        """
        self._saver.durations.restart_step(time.monotonic())
        if not self._is_long and not self._is_agreed:
            self._vote.post(self._flags())
            self._posted_in = self._turns

    def note_stop(self, report: SaveReport) -> None:
        """Log why the job stops, and what it has saved. Not collective.

        Args:
            report: Report of the last save.
        """
        self._session.note("preempted", report.step)
        stop = StopReport(step=report.step, reason=self._why, save=report)
        if self._session.comm.is_root:
            text, hosts = "asked to stop (%s); generation %d is saved%s", ""
            if report.level == "local" and self._session.hosts is not None:
                place = self._session.hosts.local.path
                hosts = only_on_hosts(place, self._session.directory.root)
            logger.warning(text, self._why, report.generation, hosts)
        self._session.observer.note_stop(stop)

    def should_stop(self) -> bool:
        """Agree on whether to stop, outside of a step.

        Collective.

        Raises:
            CollectiveError: On every live rank, if a rank never arrives or is in another
                call.
        """
        self._guard.is_heeded = True
        self._session.comm.call = "should_stop()"
        wish = bool(self._flags() & _STOP)
        (stop,) = any_of(self._session.comm, "should_stop()", wish)
        if self._agree_to_stop(wanted=stop) and self._session.comm.is_root:
            logger.warning("asked to stop (%s); the next step() saves", self._why)
        return self._is_agreed

    def settle(self) -> None:
        """Finish a posted vote, unless a deadline was missed before.

        Collective.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        if self._vote.is_posted and self._session.comm.can_meet():
            self._vote.take()

    @property
    def _drain(self) -> Drain | None:
        return None if self._session.hosts is None else self._session.hosts.drain

    @property
    def _turns(self) -> tuple[int, int]:
        """Numbers of the saves and restores, and of the copies, so far."""
        return self._turn, 0 if self._drain is None else self._drain.turn

    def _is_due_in_directory(self, step: int, *, is_due: bool) -> bool:
        """Return whether the ranks write to the directory, which hosts may do instead."""
        hosts, drain = self._session.hosts, self._drain
        if drain is None or hosts is None:
            return is_due
        if drain.is_owed or (is_due and hosts.is_off):
            return True
        if is_due and not drain.is_wanted:
            self._interval.restart()
            if drain.is_busy:
                drain.note_skipped(self._session, step)
            else:
                drain.is_wanted = self._is_local_due = True
        return False

    def _must_go_on_copying(self, flags: int, *, is_fresh: bool) -> bool:
        drain = self._drain
        if drain is None:
            return False
        if drain.is_under_way:
            if is_fresh and flags & _FAILED:
                drain.stop()  # the others need not copy the rest
                return True
            return is_fresh and not flags & _COPYING
        return drain.is_busy and is_fresh and bool(flags & _TRY)

    def _agree_to_stop(self, *, wanted: bool) -> bool:
        """Note that all ranks must stop, and find out why; return whether this is new."""
        if self._is_agreed or not wanted:
            return False
        self._is_agreed = True
        comm, signal = self._session.comm, self._guard.reason
        mine = self._reason or (f"{signal} on {comm.name}" if signal else "")

        def combine(parts: list[bytes]) -> tuple[str, bool]:
            left = None if self._requests is None else self._requests.left_seconds()
            return join_reasons(parts), fits(left, self._saver.durations.durable_seconds)

        doing = "collecting the reasons to stop"
        why, self._fits = collect(comm, doing, mine.encode, combine, error=CollectiveError)
        self._why = why
        return True

    def _warn_of_displaced(self) -> None:
        names = self._guard.displaced()
        if names and self._session.comm.is_root and not self._has_warned_of_displaced:
            self._has_warned_of_displaced = True
            logger.warning(
                "a handler for %s was installed after this manager: unless it calls the "
                "handler that it replaced, such a signal no longer asks for a save",
                ", ".join(names),
            )

    def _flags(self) -> int:
        flags = _STOP * self.must_stop + _WRITING * self._saver.is_writing
        if (drain := self._drain) is not None:
            is_root = self._session.comm.is_root
            flags |= _COPYING * drain.is_copying | _FAILED * drain.has_failed
            flags |= _TRY * (is_root and drain.must_try)
        if self._requests is not None:
            durations = self._saver.durations
            flags |= _LONG * (durations.last_step_seconds >= _LONG_STEP_SECONDS)
            flags |= _DUE * self._interval.is_due_now()
            flags |= _LOCAL * self._local.is_due_now()
            if not self._reason:
                self._reason = self._requests.reason(
                    durations.durable_seconds,
                    max(durations.step_seconds, durations.last_step_seconds),
                )
            flags |= _STOP * bool(self._reason)
        return flags

    def _known_failures(self) -> Failures:
        every, directory = self._every, self._session.directory
        if not isinstance(every, AutoInterval):
            return ASSUMED
        if every.mtbf is not None:
            return Failures(every.mtbf.total_seconds(), "as given")
        try:
            saves = [(info.job, info.time) for info in directory.catalog.generations()]
        except CheckpointError:
            # Only root is here. If the directory cannot be listed, the next save fails.
            return ASSUMED
        return count_failures(saves, directory.job, time.time())
