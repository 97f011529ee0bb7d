# SPDX-License-Identifier: Apache-2.0
"""Keeps a job's notes for ``mpi-ckpt run``: how far it came, and how it ended.

A launcher's exit code is not enough: Open MPI's mpirun returns 0 when a host was lost. So
the restart loop names a file in the environment, and the job writes one line of JSON for
each event; without that variable it writes nothing. Notes are not made durable: a power cut
ends the reader too.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ckpt.storage import filesystem

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

VARIABLE = "MPI_CKPT_NOTES"
"""Environment variable with the beginning of the paths that notes are written to."""

_TEXT_MAX = 500
_FILE_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One event in a job.

    Attributes:
        event: ``started``, ``restored``, ``saved``, ``preempted``, ``failed``,
            ``finished``, or ``survived``: the job ended normally, though it had lost ranks.
        directory: The checkpoint directory of the manager that noted it.
        step: The training step of the event.
        error: Class and text of the exception, for ``failed``.
        writer: The process that wrote it.
    """

    event: str
    directory: str = ""
    step: int = 0
    error: str = ""
    writer: str = ""


class Notes:
    """The notes that a process writes. Not collective. Main thread only.

    Args:
        prefix: Beginning of the path of its file; empty to write nothing.
    """

    def __init__(self, prefix: str = "") -> None:
        name = f"{prefix}.{socket.gethostname()}-{os.getpid()}.jsonl"
        self._path = Path(name) if prefix else None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Notes:
        """Return notes for the loop that started this job; without a loop, empty ones."""
        return cls(environ.get(VARIABLE, ""))

    def add(self, event: str, **facts: str | int) -> None:
        """Note an event; a failure to do so is ignored."""
        if self._path is None:
            return
        line = json.dumps({"event": event, **facts}) + "\n"
        try:
            filesystem.append(self._path, line.encode())
        except OSError as error:
            logger.warning("mpi-ckpt run will not learn of %r: %s", event, error)

    def add_error(self, error: BaseException, **facts: str | int) -> None:
        """Note an exception that ends the job."""
        try:
            text = f"{type(error).__name__}: {error}"
        except Exception:  # a program's exception may have any __str__
            text = type(error).__name__
        self.add("failed", error=text[:_TEXT_MAX], **facts)


def read_notes(prefix: Path) -> list[Note]:
    """Return the notes of all processes of a job, each in its order.

    Not collective. Skips lines that are incomplete or not notes.
    """
    notes = []
    for name in _names(prefix):
        data = filesystem.read_start(prefix.parent / name, _FILE_BYTES_MAX)
        for line in data.splitlines():
            note = _parse(line, name)
            if note is not None:
                notes.append(note)
    return notes


def remove_notes(prefix: Path) -> None:
    """Delete the notes of all processes of a job. Not collective."""
    for name in _names(prefix):
        filesystem.remove_file(prefix.parent / name)


def _names(prefix: Path) -> list[str]:
    names = filesystem.list_names(prefix.parent)
    return [name for name in names if name.startswith(f"{prefix.name}.")]


def _parse(line: bytes, writer: str) -> Note | None:
    try:
        found: Any = json.loads(line)
        return Note(
            event=str(found["event"]),
            directory=str(found.get("directory", "")),
            step=int(found.get("step", 0)),
            error=str(found.get("error", "")),
            writer=writer,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
