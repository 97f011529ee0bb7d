# SPDX-License-Identifier: Apache-2.0
"""Runs a launcher as a child process: watches, signals, and ends it with its processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.cli.command import MISUSED, CommandError
from mpi_ckpt.storage.faults import in_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GRACE_SECONDS = 10.0
"""A launcher that is told to end needs this to end what it has started elsewhere."""

_TAIL_BYTES = 64 << 10
_STDERR = 2


class Child:
    """A launcher in its own session; its standard error is passed on.

    A context manager: at its end no process of the session is left.

    Args:
        command: The command.
        environ: Its environment.
        quiet: Whether its standard output goes to standard error as well.

    Raises:
        CommandError: If it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], *, quiet: bool
    ) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=_STDERR if quiet else None,
                stderr=subprocess.PIPE,
                start_new_session=True,  # this process passes on a Ctrl-C
            )
        except OSError as error:
            raise CommandError(
                f"{command[0]} cannot be started: {in_words(error)}", code=MISUSED
            ) from None
        assert self._process.stderr is not None
        self._pipe = self._process.stderr.fileno()
        os.set_blocking(self._pipe, False)
        self._tail = b""

    @property
    def said(self) -> str:
        """The end of its standard error."""
        return self._tail.decode(errors="replace")

    def wait(self, seconds: float) -> int | None:
        """Wait at most this long; return the exit code if it has ended."""
        ready, _, _ = select.select([self._pipe], [], [], seconds)
        if ready and not self._pass_on():
            time.sleep(seconds)  # it has closed its standard error, but still runs
        code = self._process.poll()
        if code is None:
            return None
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """Send the launcher a signal, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def end(self) -> None:
        """Ask the launcher to end; kill its remaining processes after a while."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        deadline = time.monotonic() + GRACE_SECONDS
        while self.wait(0.05) is None and time.monotonic() < deadline:
            pass
        self.kill()

    def kill(self) -> None:
        """Kill the launcher and all processes that it has started on this host."""
        for pid in _members(self._process.pid):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        while self._pass_on():
            pass
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _pass_on(self) -> bool:
        try:
            data = os.read(self._pipe, _TAIL_BYTES)
        except BlockingIOError:
            return False
        with suppress(OSError):  # the reader of this output is gone
            os.write(_STDERR, data)
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        return bool(data)


def _members(leader: int) -> set[int]:
    """Return the processes of a session, and the descendants of its leader."""
    parents: dict[int, int] = {}
    members = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, ValueError, IndexError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(stat[1])
                # Open MPI gives each rank a group of its own, but not a session.
                if int(stat[3]) == leader:
                    members.add(int(entry.name))
    members.add(leader)
    for pid in parents:
        above = pid
        while above in parents and above not in members:
            above = parents[above]
        if above in members:
            members.add(pid)
    return members
