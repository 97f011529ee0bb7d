# SPDX-License-Identifier: Apache-2.0
"""Runs the restart loop: starts a job again until it has finished."""

from __future__ import annotations

import secrets
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.cli.command import CommandError
from mpi_ckpt.cli.plain_text import json_text, plural
from mpi_ckpt.cli.restart.child import Child
from mpi_ckpt.cli.restart.hosting import suspects
from mpi_ckpt.cli.restart.launching import (
    Host,
    Launcher,
    launch_command,
    left_behind,
    place,
    salvage_command,
)
from mpi_ckpt.cli.restart.outcome import PREEMPTED_CODE, Ending, judge, next_move
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.notes import VARIABLE, read_notes, remove_notes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mpi_ckpt.cli.restart.hosting import HostBook
    from mpi_ckpt.cli.restart.launching import Salvage

LOG = "attempts.jsonl"

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
_HOSTS_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of the loop.

    Attributes:
        program: The program of every rank.
        launcher: The launcher.
        size: How many ranks to start, if there are enough slots.
        least: The least number of ranks to start with.
        max_restarts: Limit of the attempts after the first.
        backoff: Seconds to wait after a first failure.
        timeout: Seconds without a note from the job after which the loop ends it; 0 for
            never.
        patience: Seconds to wait for hosts.
        trust_code: Whether exit code 0 is enough from a job without notes.
        stop_when_preempted: Whether the loop ends after a preemption, since a scheduler
            starts it again.
        folder: Directory of the notes and the log, which every host sees.
        salvage: What hosts keep, to be copied to the directory; None for nothing.
    """

    program: tuple[str, ...]
    launcher: Launcher
    size: int
    least: int
    max_restarts: int
    backoff: float
    timeout: float
    patience: float
    trust_code: bool
    stop_when_preempted: bool
    folder: Path
    salvage: Salvage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of the job, for the log."""

    run: str
    attempt: int
    began: float
    seconds: float
    np: int
    hosts: tuple[str, ...]
    code: int
    outcome: str
    step_from: int
    step_to: int
    error: str
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Requests:
    """Received signals, to be passed on. A context manager: handlers are installed in it.

    Handlers only note a signal; the loop checks between two waits.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _note(self, *_: object) -> None:
        self.count += 1


class Loop:
    """Starts the job, judges how it ends, and starts it again.

    Args:
        plan: The settings.
        book: The hosts.
        requests: Signals that ask to stop.
        environ: The environment of the job.
        say: Prints events for users.
        quiet: Whether to keep the job's standard output apart from the loop's.

    Attributes:
        attempts: All attempts so far.
        reason: Why there is no other attempt, at the end.
    """

    def __init__(
        self,
        plan: Plan,
        book: HostBook,
        requests: Requests,
        environ: Mapping[str, str],
        say: Callable[[str], None],
        *,
        quiet: bool,
    ) -> None:
        self._plan = plan
        self._book = book
        self._requests = requests
        self._environ = environ
        self._say = say
        self._quiet = quiet
        self._run = secrets.token_hex(4)
        self._endings: list[Ending] = []
        self.attempts: list[Attempt] = []
        self.reason = ""

    def run(self) -> bool:
        """Return whether the job has finished.

        Raises:
            CommandError: If the launcher or the hosts script cannot be run.
        """
        plan = self._plan
        filesystem.make_directories(plan.folder)
        while not self.reason:
            size, hosts = self._choose()
            if size == 0:
                break
            last = self.attempts[-1].hosts if self.attempts else ()
            if left_behind(last, self._book.listed, [host.name for host in hosts]):
                self._salvage()
            ending = self._attempt(size, hosts)
            self._endings.append(ending)
            move = next_move(self._endings, plan.max_restarts, plan.backoff)
            # A finished job counts as finished, even after a request to stop.
            self.reason = move.stop
            if not self.reason and self._requests.count:
                self.reason = "asked to stop"
            if ending.outcome == "preempted" and plan.stop_when_preempted:
                self.reason = "preempted"
            if not self.reason and move.seconds:
                self._say(f"next attempt in {move.seconds:.0f} s")
                self._rest(move.seconds)
        if self.reason != "finished":
            with suppress(CommandError):  # the last answer is as good as can be had
                self._book.usable()  # some hosts may be gone since the last attempt
            self._salvage()
        return self.reason == "finished"

    def _salvage(self) -> None:
        """Copy what the hosts of the last attempt keep to the directory, if asked for."""
        plan = self._plan
        if plan.salvage is None or not self.attempts:
            return
        last = self.attempts[-1]
        hosts = [name for name in last.hosts if name in self._book.listed]
        if last.hosts and not hosts:
            self._say("none of the last hosts is there: what they keep is not copied")
            return
        self._say(f"copying what hosts keep to {plan.salvage.directory}")
        asked = self._requests.count
        code, said = self._copy_from(hosts, plan.salvage)
        gone = suspects(said, hosts)
        if code and gone and len(gone) < len(hosts) and self._requests.count == asked:
            self._say(f"once more, without {', '.join(sorted(gone))}")
            hosts = [name for name in hosts if name not in gone]
            code, _ = self._copy_from(hosts, plan.salvage)
        if code != 0:
            self._say(f"what hosts keep was not copied: the rescue ended with code {code}")

    def _copy_from(self, hosts: Sequence[str], salvage: Salvage) -> tuple[int, str]:
        """Run a rescue on hosts; return its exit code, and what its launcher said."""
        plan = self._plan
        command = salvage_command(plan.launcher, self.attempts[-1].np, hosts, salvage)
        asked = self._requests.count
        with Child(command, self._environ, quiet=self._quiet) as child:
            while (code := child.wait(_POLL_SECONDS)) is None:
                if self._requests.count > asked:
                    asked = self._requests.count
                    child.end()
        return code, child.said

    def _choose(self) -> tuple[int, tuple[Host, ...]]:
        plan = self._plan
        if not self._book.is_known:
            return plan.size, ()
        deadline = time.monotonic() + plan.patience
        has_said = False
        while not self.reason:
            usable = self._book.usable()
            size, hosts = place(usable, plan.size, plan.least)
            if size:
                return size, hosts
            slots = sum(host.slots for host in usable)
            if time.monotonic() >= deadline:
                self.reason = (
                    f"{slots} slots on {len(usable)} hosts, {plan.least} are needed, and "
                    f"no more became free within {plan.patience:.0f} s"
                )
            elif not has_said:
                self._say(f"waiting for hosts: {slots} slots, {plan.least} are needed")
                has_said = True
            self._rest(_HOSTS_SECONDS if plan.patience else 0)
        return 0, ()

    def _attempt(self, size: int, hosts: Sequence[Host]) -> Ending:
        plan = self._plan
        number = len(self.attempts) + 1
        prefix = plan.folder / f"notes-{self._run}-{number}"
        command = launch_command(plan.launcher, size, hosts, plan.program)
        environ = {**self._environ, VARIABLE: str(prefix)}
        names = tuple(host.name for host in hosts)
        where = f" on {', '.join(names)}" if names else ""
        self._say(f"attempt {number}: {plural(size, 'rank')}{where}")
        began, start = time.time(), time.monotonic()
        with Child(command, environ, quiet=self._quiet) as child:
            code, hung = self._watch(child, prefix)
        notes = read_notes(prefix)
        remove_notes(prefix)
        self._book.note_used(names)
        ending = judge(code, notes, hung=hung, trust_code=plan.trust_code)
        out: list[str] = []
        # An exception is the program's fault. Any other end may be a host's.
        if ending.outcome in ("failed", "lost") and not any(
            note.event == "failed" for note in notes
        ):
            out = self._book.blame(suspects(child.said, names))
        self._log(
            Attempt(
                run=self._run,
                attempt=number,
                began=began,
                seconds=round(time.monotonic() - start, 3),
                np=size,
                hosts=names,
                code=code,
                outcome=ending.outcome,
                step_from=ending.began,
                step_to=ending.reached,
                error=ending.error,
                left_out=tuple(out),
            )
        )
        return ending

    def _watch(self, child: Child, prefix: Path) -> tuple[int, bool]:
        """Wait for the end; pass on signals; end a job that shows no progress."""
        passed_on, sign, alive = 0, -1, time.monotonic()
        looked = alive
        while (code := child.wait(_POLL_SECONDS)) is None:
            if passed_on < self._requests.count:
                # The only signal that every launcher passes on to its ranks; a second
                # request does not wait for their save.
                (child.signal(signal.SIGUSR1) if passed_on == 0 else child.end())
                passed_on += 1
            now = time.monotonic()
            if self._plan.timeout and now - looked >= _LOOK_SECONDS:
                looked, count = now, len(read_notes(prefix))
                if count != sign:
                    sign, alive = count, now
                elif now - alive > self._plan.timeout:
                    self._say(
                        f"no sign of life for {self._plan.timeout:.0f} s: the "
                        "attempt is ended"
                    )
                    child.end()
                    return PREEMPTED_CODE, True
        return code, False

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._requests.count:
            time.sleep(_POLL_SECONDS)
        if self._requests.count:
            self.reason = self.reason or "asked to stop"

    def _log(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        line = json_text(attempt.to_json(), indent=None) + "\n"
        try:
            filesystem.append(self._plan.folder / LOG, line.encode())
        except OSError as error:
            self._say(f"{self._plan.folder / LOG} cannot be written: {error}")
        text = f"attempt {attempt.attempt}: {attempt.outcome} at step {attempt.step_to}"
        self._say(f"{text}: {attempt.error}" if attempt.error else text)
        if attempt.left_out:
            self._say(f"left out from now on: {', '.join(attempt.left_out)}")
