# SPDX-License-Identifier: Apache-2.0
"""Describes a rank's process and thread by what the operating system knows. No MPI."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpi_ckpt.errors import CollectiveError

_HOST_BYTES = 64
_NUMBER_BYTES = 16

_DEAD = ("Z", "X")
_STATES = {
    "T": "is stopped by a signal",
    "t": "is stopped by a debugger",
    "D": "is held up by a device or a file system",
    "R": "is running other code",
    "Z": "has died",
    "X": "has died",
}


def host_name() -> str:
    """Return the name of this host, whatever its bytes, as text that can be sent."""
    name = socket.gethostname().encode(errors="surrogateescape")
    return name[:_HOST_BYTES].decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Presence:
    """Where a rank runs.

    Attributes:
        host: Name of its host.
        process: Its process id there.
        started: Its start time, in ticks of that host: with the id, this tells the process
            from any other, even in another container of that host name.
    """

    host: str
    process: int
    started: int

    nbytes = _HOST_BYTES + _NUMBER_BYTES

    @classmethod
    def own(cls) -> Presence:
        """Describe this process. Not collective."""
        process = os.getpid()
        _, started = _look_up(process) or ("", 0)
        return cls(host_name(), process, started)

    def encode(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Return the presence as bytes of a fixed length. Not collective."""
        host = self.host.encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0")
        numbers = np.array([self.process, self.started], np.int64).tobytes()
        return np.frombuffer(host + numbers, np.uint8)

    @classmethod
    def decode(cls, encoded: bytes) -> Presence:
        """Return the presence that `encode` encoded. Not collective."""
        host = encoded[:_HOST_BYTES].rstrip(b"\0").decode(errors="replace")
        process, started = np.frombuffer(encoded[_HOST_BYTES:], np.int64).tolist()
        return cls(host, process, started)

    @property
    def is_visible(self) -> bool:
        """Whether this process can see that one: same host, same container."""
        if self.host != host_name():
            return False
        found = _look_up(self.process)
        return found is not None and found[1] == self.started

    @property
    def is_gone(self) -> bool:
        """Whether a process that was visible before has died."""
        found = _look_up(self.process)
        return found is None or found[1] != self.started or found[0] in _DEAD

    def describe(self) -> str:
        """Return in words what a once visible process is doing. Not collective."""
        found = _look_up(self.process)
        if found is None or found[1] != self.started:
            return f"process {self.process} is not there any more"
        waits = f"waits{_kernel_function(self.process)}"
        return f"process {self.process} {_STATES.get(found[0], waits)}"


@dataclass(slots=True)
class Home:
    """The process and the thread that made a communicator, which alone may use it.

    Attributes:
        process, thread: Their numbers.
        hook: The function of the program that this rank runs alone now; empty for none.
    """

    process: int = field(default_factory=os.getpid)
    thread: int = field(default_factory=threading.get_ident)
    hook: str = ""

    def require(self, call: str, rank: int) -> None:
        """Refuse a call from elsewhere, which would wait for ever. Not collective.

        Args:
            call: The public call, for the error.
            rank: Rank of the process.

        Raises:
            CollectiveError: On the calling rank.
        """
        if os.getpid() != self.process:
            raise CollectiveError(
                f"{call}: this process was forked from rank {rank}, and cannot use MPI: "
                "make collective calls in the parent only"
            )
        if self.hook:
            raise CollectiveError(
                f"{call}: called in {self.hook}, which root alone runs: the other ranks "
                "would never arrive; make collective calls after the save or restore"
            )
        if threading.get_ident() != self.thread:
            raise CollectiveError(
                f"{call}: called in another thread than the one that made the manager: "
                "make all collective calls of a rank in that thread"
            )


def _look_up(process: int) -> tuple[str, int] | None:
    """Return a process's state and start from the kernel's file; None if there is none."""
    with suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{process}/stat").read_text()
        # The name in brackets may contain anything, brackets too.
        fields = status.rpartition(")")[2].split()
        return fields[0], int(fields[19])
    return None


def _kernel_function(process: int) -> str:
    with suppress(OSError):  # not every user may read it
        name = Path(f"/proc/{process}/wchan").read_text().strip()
        if name not in ("", "0"):
            return f" in the kernel ({name})"
    return ""
