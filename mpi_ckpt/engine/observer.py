# SPDX-License-Identifier: Apache-2.0
"""Shows people and programs what the ranks do: the log, hooks, the journal, the timeline.

Nothing here changes how a save or a restore ends. Root alone reports; every rank keeps the
report of the last save.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import gather_bytes
from mpi_ckpt.reports import PhaseClock, Progress, bytes_text
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.journal import HistoryEvent, Journal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.errors import CheckpointError
    from mpi_ckpt.hooks import Hooks
    from mpi_ckpt.reports import RestoreReport, SaveReport, StopReport
    from mpi_ckpt.storage.directory import CheckpointDirectory

logger = logging.getLogger(__name__)


_TRAINING = "training"
_SHOWN_SECONDS = 1.0
"""How often a step may write the status: as often as a step looks for a halt file."""


class Observer:
    """Reports what the ranks of a manager do. Not collective.

    Main thread only, except for the clock of a save in the background.

    Args:
        comm: The manager's communicator.
        directory: The checkpoint directory; used on root only.
        hooks: The functions of the program; used on root only.
        timeline: Records the phases.

    Attributes:
        last_save: The report of the last acknowledged save; None before the first.
        copying: Returns how far hosts are in copying a save to the directory, see
            `Drain.progress`; None if no copy is under way. Called on any thread.
    """

    def __init__(
        self,
        comm: Communicator,
        directory: CheckpointDirectory,
        hooks: Hooks,
        timeline: Timeline,
    ) -> None:
        self._comm = comm
        self._directory = directory
        self._hooks = hooks
        self._timeline = timeline
        self._journal = Journal(directory.root)
        self._showing = threading.Lock()
        self._shown_at = 0.0
        # Every key is there from the start: another thread may read while values change.
        self._facts: dict[str, Any] = {
            "pid": os.getpid(),
            "started": time.time(),
            "step": 0,
            "due": {},
            "last_save": None,
            "kept": None,
            "local_failures": 0,
            "ended": None,
            "reason": "",
        }
        self._clock: PhaseClock | None = None
        self._doing = _TRAINING
        self._since = time.time()
        self.last_save: SaveReport | None = None
        self.copying: Callable[[], Mapping[str, float] | None] = lambda: None

    def begin(self, doing: str) -> PhaseClock:
        """Note that a save or restore begins; return the clock for its phases."""
        if not self._comm.is_root:
            return PhaseClock(ended=self._timeline.add)
        clock = PhaseClock(self.show_soon, self._timeline.add, Progress(self._show))
        self.resume(doing, clock)
        return clock

    def resume(self, doing: str, clock: PhaseClock) -> None:
        """Note that a save goes on in the background. On the thread that writes."""
        self._doing, self._clock, self._since = doing, clock, time.time()

    def pause(self, clock: PhaseClock) -> None:
        """Note that a save or restore has ended, or goes on in the background."""
        if self._clock is clock:
            self._doing, self._clock, self._since = _TRAINING, None, time.time()

    def note_step(self, step: int, due: Mapping[str, float]) -> None:
        """Note the end of a step; show it, at most once a second.

        Args:
            step: Steps done.
            due: When the next save is due: at a ``step``, at a ``time``, or never.
        """
        if not self._comm.is_root:
            return
        self._facts["step"], self._facts["due"] = step, due
        self.show_soon()

    def note_save(self, report: SaveReport) -> None:
        """Report an acknowledged save, or one that the hosts keep. On every rank."""
        is_local = report.level == "local"
        if not is_local:
            self.last_save = report
        if not self._comm.is_root:
            return
        logger.info("%s", describe_save(report))
        self._add(
            "kept" if is_local else "saved",
            step=int(report.step),
            generation=report.generation,
            nbytes=report.bytes_written,
            reused=report.bytes_reused,
            seconds=report.seconds,
            metrics=report.metrics,
            copied_from=report.copied_from,
            lag=report.lag,
            skipped=report.skipped,
        )
        if self._clock is not None:
            self.pause(self._clock)
        self._facts["step"] = int(report.step)
        self._facts["kept" if is_local else "last_save"] = _facts_of(report)
        if is_local:
            self._facts["local_failures"] = 0
        self._show()
        self._call("on_save", report)

    def note_failed_local(self, step: int, failures: int, error: CheckpointError) -> None:
        """Report that hosts could not keep a save. On every rank.

        Args:
            step: Its training step.
            failures: How many have failed in a row.
            error: Why.
        """
        if self._comm.is_root:
            self._add("failed", step=step, reason=type(error).__name__)
            self._facts["local_failures"] = failures
            self._show()

    def note_restore(self, report: RestoreReport | None) -> None:
        """Report a restore, or that there was nothing to restore. On every rank."""
        if not self._comm.is_root:
            return
        if report is None:
            logger.info("nothing in %s: starting fresh", self._directory.root)
            self._add("fresh")
            return
        logger.info("%s", describe_restore(report))
        self._add(
            "restored",
            step=int(report.step),
            generation=report.generation,
            saved_ranks=report.saved_size,
            nbytes=report.bytes_read,
            seconds=report.seconds,
        )
        self._facts["step"] = int(report.step)
        self._show()
        self._call("on_restore", report)

    def note_stop(self, report: StopReport) -> None:
        """Report a stop that was requested. On every rank."""
        if self._comm.is_root:
            self._add("stopped", step=int(report.step), reason=report.reason)
            self._call("on_stop", report)

    def note_end(self, step: int, error: BaseException | None) -> None:
        """Report that the manager is left. On every rank."""
        if not self._comm.is_root:
            return
        reason = "" if error is None else type(error).__name__
        self._add("ended", step=step, reason=reason)
        self._facts |= {"ended": time.time(), "reason": reason, "step": step}
        self._show()

    def describe_progress(self, doing: str, clock: PhaseClock, seconds: float) -> str:
        """Return a line about a long operation: what has moved, rate, and time left."""
        phase = f"{doing}, {clock.current}" if clock.current else doing
        moved, expected = clock.progress.moved, clock.progress.expected
        if not moved or not seconds:
            return f"{phase}: for {seconds:.0f} s so far"
        rate = moved / seconds
        text = f"{phase}: {bytes_text(moved)} of {bytes_text(expected)}, "
        left = max(0, expected - moved) / rate
        return f"{text}{bytes_text(round(rate))}/s, {left:.0f} s left"

    def _call(self, name: str, report: object) -> None:
        home = self._comm.home
        for function in self._hooks.functions(name):
            home.hook = f"Hooks.{name}"
            try:
                function(report)
            # The program's function may fail in any way, on root alone: what it was called
            # for has happened, on all ranks, and the training goes on.
            except Exception:
                text = "Hooks.%s has failed: %r; the training goes on"
                logger.warning(text, name, function, exc_info=True)
            finally:
                home.hook = ""

    def _add(self, event: str, **facts: Any) -> None:  # noqa: ANN401 (of an event)
        if self._directory.owner:
            job, ranks = self._directory.job, self._comm.size
            self._journal.add(
                HistoryEvent(event=event, time=time.time(), job=job, ranks=ranks, **facts)
            )

    def show_soon(self) -> None:
        """Show the status, at most once a second. On any thread."""
        if time.monotonic() - self._shown_at >= _SHOWN_SECONDS:
            self._show()

    def _show(self) -> None:
        """Write the status. On any thread; it never waits for another thread's write."""
        if not self._directory.owner or not self._showing.acquire(blocking=False):
            return
        try:
            self._shown_at = time.monotonic()
            clock = self._clock
            self._journal.show(
                {
                    **self._facts,
                    "job": self._directory.job,
                    "host": self._comm.hosts[self._comm.rank],
                    "ranks": self._comm.size,
                    "copy": self.copying(),
                    "updated": time.time(),
                    "doing": self._doing,
                    "since": self._since,
                    "phase": clock.current if clock else "",
                    "bytes_done": clock.progress.moved if clock else 0,
                    "bytes_expected": clock.progress.expected if clock else 0,
                }
            )
        finally:
            self._showing.release()


def _facts_of(report: SaveReport) -> dict[str, Any]:
    return {
        "generation": report.generation,
        "step": int(report.step),
        "time": time.time(),
        "seconds": report.seconds["total"],
        "bytes": report.bytes_written,
    }


def describe_save(report: SaveReport) -> str:
    """Return a save in one line. Pure."""
    if report.level == "local":
        return (
            f"kept generation {report.generation}, step {report.step}, on the hosts: "
            f"{bytes_text(report.bytes_written)} written, {_timed(report.seconds)}"
        )
    if report.copied_from:
        text = f"saved generation {report.generation}, step {report.step}, from the hosts: "
        text += f"{bytes_text(report.bytes_written)} copied, {_timed(report.seconds)}; "
        text += f"{report.lag} steps behind the training, {report.skipped} due saves left "
        return f"{text}out; {report.kept} kept"
    text = f"saved generation {report.generation}, step {report.step}, {_by(report.size)}: "
    text += f"{bytes_text(report.bytes_written)} written, "
    text += f"{bytes_text(report.bytes_reused)} reused, {_timed(report.seconds)}; "
    text += f"{report.kept} kept"
    return f"{text}, {len(report.pruned)} removed" if report.pruned else text


def describe_restore(report: RestoreReport) -> str:
    """Return a finished restore in one line. Pure."""
    what = f"generation {report.generation}"
    if report.from_memory:
        what = "the copy in memory"
    text = f"restored {what}, step {report.step}, saved {_by(report.saved_size)}"
    if report.size != report.saved_size:
        text += f", now {report.size}"
    read = "" if report.from_memory else f"{bytes_text(report.bytes_read)} read, "
    return f"{text}: {read}{_timed(report.seconds)}"


def _by(size: int) -> str:
    return f"by {size} rank{'' if size == 1 else 's'}"


def _timed(seconds: Mapping[str, float]) -> str:
    phases = {name: spent for name, spent in seconds.items() if name != "total"}
    listed = ", ".join(f"{name} {spent:.3g} s" for name, spent in phases.items())
    return f"in {seconds['total']:.3g} s ({listed})" if listed else "at once"


VARIABLE = "MPI_CKPT_TIMELINE"
"""Environment variable of root with the path of the file."""

_EVENTS_MAX = 100_000
_SHORTEST_SECONDS = 1e-5
_SHORTEST_OUTSIDE_SECONDS = 1e-3
"""Between saves every step waits: only waits that a person could notice are recorded."""


class Timeline:
    """The events of a rank, until root has written them. Off unless `start` is called.

    Main thread only, unless a method says otherwise.

    Args:
        comm: The manager's communicator.
        path: The file, on root; None for none. A file that exists is kept: the next free
            name of ``file-2.json``, ``file-3.json`` and so on is taken.

    Attributes:
        is_on: Whether events are recorded; the same on every rank.
        is_wanted: Whether this rank is root, and has a path.
    """

    def __init__(self, comm: Communicator, path: str | None = None) -> None:
        self._comm = comm
        self._path = Path(path) if path else None
        self._is_made = False
        self._operations = 0
        self._events: list[dict[str, Any]] = []
        self._dropped = 0
        self._epoch = 0.0
        self.is_on = False
        self.is_wanted = comm.is_root and self._path is not None

    @classmethod
    def from_environment(cls, comm: Communicator) -> Timeline:
        """Return the timeline that root's environment asks for. Not collective."""
        return cls(comm, os.environ.get(VARIABLE) if comm.is_root else None)

    def start(self) -> None:
        """Start to record. Not collective, but called on every rank."""
        self.is_on = True
        # Both clocks are read once: the time of day may be set while the job runs.
        self._epoch = time.time() - time.perf_counter()
        self._comm.on_wait = self._add_wait

    def begin(self) -> None:
        """Note that a save or restore has begun. Not collective."""
        self._operations += 1

    def end(self, name: str, start: float) -> None:
        """Add a save or restore, which has ended. Not collective.

        Args:
            name: What it was.
            start: `time.perf_counter` at its start.
        """
        self._operations -= 1
        self.add(name, start, "operation")

    def add(self, name: str, start: float, kind: str = "phase") -> None:
        """Add an event that ends now. Not collective. Thread-safe.

        Args:
            name: What it was.
            start: `time.perf_counter` at its start.
            kind: ``operation``, ``phase``, ``exchange`` or ``wait``.
        """
        if not self.is_on:
            return
        if len(self._events) >= _EVENTS_MAX:
            self._dropped += 1
            return
        behind = threading.get_ident() != self._comm.home.thread
        event = {
            "name": name,
            "cat": kind,
            "ph": "X",
            "pid": self._comm.rank,
            "tid": int(behind),
            "ts": round(1e6 * (self._epoch + start), 1),
            "dur": round(1e6 * (time.perf_counter() - start), 1),
        }
        self._events.append(event)

    def flush(self) -> None:
        """Send the events to root, which writes them; nothing if the timeline is off.

        Collective.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        if not self.is_on:
            return
        events, self._events = self._events, []
        lines = "".join(f"{json.dumps(event)},\n" for event in events)
        gathered = gather_bytes(self._comm, lines.encode(), "writing the timeline")
        if self._comm.is_root:
            self._write(b"".join(gathered))

    def close(self) -> None:
        """Send and write what is left, and complete the file. Collective.

        Raises:
            CollectiveError: On every live rank, if one never arrives.
        """
        self.flush()
        if self._is_made:
            # Without this, a reader that is stricter than Perfetto would refuse the file.
            last = {"name": "dropped events", "ph": "C", "pid": 0, "ts": _now()}
            self._write(json.dumps({**last, "args": {"count": self._dropped}}).encode())
            self._write(b"\n]\n")
        self._path = None

    def _add_wait(self, doing: str, streaming: bool, start: float) -> None:
        least = _SHORTEST_SECONDS if self._operations else _SHORTEST_OUTSIDE_SECONDS
        if time.perf_counter() - start >= least:
            self.add(doing, start, "exchange" if streaming else "wait")

    def _write(self, data: bytes) -> None:
        if self._path is None:
            return
        try:
            if not self._is_made:
                self._path = _make(self._path, self._heading())
                self._is_made = True
            filesystem.append(self._path, data)
        except OSError as error:
            logger.warning("the timeline is not written any more: %s", error)
            self._path = None

    def _heading(self) -> bytes:
        lines = ["["]
        for rank, host in enumerate(self._comm.hosts):
            names = [("process_name", 0, f"rank {rank} on {host}")]
            names += [("thread_name", 0, "main"), ("thread_name", 1, "background")]
            for name, thread, value in names:
                event = {"name": name, "ph": "M", "pid": rank, "tid": thread}
                lines.append(f"{json.dumps({**event, 'args': {'name': value}})},")
        return ("\n".join(lines) + "\n").encode()


def _make(path: Path, heading: bytes) -> Path:
    """Make a file under a free name, and return its path."""
    for number in count(2):
        try:
            with filesystem.create_file(path) as descriptor:
                filesystem.write_all(descriptor, heading, 0)
        except FileExistsError:
            stem = path.stem.removesuffix(f"-{number - 1}")
            path = path.with_name(f"{stem}-{number}{path.suffix}")
        else:
            break
    return path


def _now() -> float:
    return round(1e6 * time.time(), 1)
