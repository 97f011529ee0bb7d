# SPDX-License-Identifier: Apache-2.0
"""Records what every rank does when, for a picture of saves and restores.

Root's ``MPI_CKPT_TIMELINE`` names a file in the trace event format of Chrome, which
Perfetto opens: one process for each rank, one track for its main thread, and one for the
thread that saves in the background. The ranks send their events to root at the end of each
save and restore. Ranks on several hosts are as well aligned as the clocks of these hosts.
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
from mpi_ckpt.storage import filesystem

if TYPE_CHECKING:
    from mpi_ckpt.comm import Communicator

logger = logging.getLogger(__name__)

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
