# SPDX-License-Identifier: Apache-2.0
"""Defines every error that this package raises.

::

    CheckpointError(Exception)
    ├─ RegistrationError(ValueError)      a name is illegal, taken, or differs between ranks
    ├─ OptionsError(ValueError)           out of range, or different between ranks
    ├─ LaunchError(RuntimeError)          launcher and MPI disagree; no MPI found
    ├─ LockedError                        another job owns the checkpoint directory
    ├─ SaveError                          nothing published, earlier generations untouched
    │  ├─ StageError                      a state could not give its contents
    │  ├─ DivergedError                   sync="check": replicas differ
    │  ├─ FencedError                     another job has taken the directory over
    │  ├─ WriteError(OSError)             a file of the partial could not be written
    │  └─ PublishError(OSError)           the last steps of the commit failed
    ├─ RestoreError
    │  ├─ NoCheckpointError(FileNotFoundError)
    │  ├─ NotSavedError(KeyError)         a generation has no such state or leaf
    │  ├─ ReadError(OSError)              a file is there and cannot be read
    │  ├─ CorruptGenerationError          bytes or names disagree with the manifest
    │  ├─ UnsupportedFormatError          a newer version, or another library
    │  └─ StateMismatchError              missing, unexpected, wrong shape or dtype
    └─ CollectiveError                    ranks that never arrived

A failure on any rank is raised on every rank, as the same class with the same message.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "CorruptGenerationError",
    "DivergedError",
    "FencedError",
    "LaunchError",
    "LockedError",
    "NoCheckpointError",
    "NotSavedError",
    "OptionsError",
    "PublishError",
    "ReadError",
    "RegistrationError",
    "RestoreError",
    "SaveError",
    "StageError",
    "StateMismatchError",
    "UnsupportedFormatError",
    "WriteError",
]


_LINES_MAX = 24
_MORE = re.compile(r" *and ([\d,]+) more: `problems` of the error has them")


def cut_lines(text: str, most: int = _LINES_MAX) -> str:
    """Return the first lines of a text, and a line that counts the rest. Pure.

    Args:
        text: The text; it may have been cut before.
        most: Lines to keep, at least one; a single further line is kept, not counted.
    """
    lines = text.split("\n")
    if len(lines) <= most + 1:
        return text
    more = len(lines) - most
    before = _MORE.fullmatch(lines[-1])
    if before is not None:
        more += int(before[1].replace(",", "")) - 1
    return "\n".join(
        [*lines[:most], f"    and {more:,} more: `problems` of the error has them"]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """What went wrong on one rank, as text that can travel.

    Attributes:
        rank: Rank on this package's communicator.
        size: Number of ranks.
        host: Host name of the rank.
        operation: What the rank was doing.
        kind: Class name of the exception.
        message: Its text.
        errno: Its errno, where it is an OSError.
        path: The file concerned, where there is one.
        generation: The generation concerned, where there is one.
        problems: Each single finding, where the exception lists several.
        traceback: The formatted traceback.
    """

    rank: int
    size: int
    host: str
    operation: str
    kind: str
    message: str
    errno: int | None = None
    path: str | None = None
    generation: int | None = None
    problems: Sequence[str] = ()
    traceback: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values. Not collective. Thread-safe."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"rank {self.rank} of {self.size} on {self.host}"
        text = f"{where}, {self.operation}: {self.message}"
        # An OSError names its path itself; so do this package's errors.
        if self.path and self.path not in self.message:
            text += f" [{self.path}]"
        if self.kind in __all__:  # an error of this package is complete in itself
            return text
        return f"{text} ({self.kind})"


class Printing(NamedTuple):
    """How a rank prints an error that all ranks raise, if the program does not catch it.

    Attributes:
        name: Name of this rank.
        brief: Printed in place of the traceback, which another rank prints; empty on the
            rank that prints the traceback.
    """

    name: str
    brief: str


class CheckpointError(Exception):
    """Base of every error of this package.

    Args:
        message: What failed, where, what was expected and found, what is still safe. If it
            has more than 25 lines, `str` gives the first 24 and the number of the rest.
        path: File or directory concerned.
        generation: Generation concerned.
        errno: Error number of the operating system, where there is one.
        failures: One record for each rank that failed; the same on every rank.
        problems: Each single finding, where an error lists several.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        generation: int | None = None,
        errno: int | None = None,
        failures: Sequence[RankFailure] = (),
        problems: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.generation = generation
        self.errno = errno
        self.failures: Sequence[RankFailure] = failures
        self.problems = tuple(problems)
        self.printing: Printing | None = None

    def __str__(self) -> str:
        return cut_lines(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError's own method would lose errno, which launchers and process pools need.
        known = ("path", "generation", "errno", "failures", "problems")
        remade = partial(type(self), **{name: getattr(self, name) for name in known})
        return remade, (self.message,)


class RegistrationError(CheckpointError, ValueError):
    """A state's name is illegal, taken, or differs between ranks."""


class OptionsError(CheckpointError, ValueError):
    """Options are out of range, contradict each other, or differ between ranks."""


class LaunchError(CheckpointError, RuntimeError):
    """The launcher's variables and MPI disagree about the job, or MPI is missing."""


class LockedError(CheckpointError):
    """Another job owns the checkpoint directory."""


class SaveError(CheckpointError):
    """A save failed: nothing was published, earlier generations are untouched."""


class StageError(SaveError):
    """A state could not give its contents."""


class DivergedError(SaveError):
    """Replicas differ where the state was asked to check that they do not."""


class FencedError(SaveError):
    """Another job has taken over the directory: this job may no longer publish."""


class WriteError(SaveError, OSError):
    """A file of the partial could not be written."""


class PublishError(SaveError, OSError):
    """The manifest, the rename or the last fsync failed."""


class RestoreError(CheckpointError):
    """A restore failed."""


class NoCheckpointError(RestoreError, FileNotFoundError):
    """There is nothing to restore from."""


class NotSavedError(RestoreError, KeyError):
    """A loaded generation has no state or leaf of that name."""


class ReadError(RestoreError, OSError):
    """A file exists but the operating system cannot read it."""


class CorruptGenerationError(RestoreError):
    """The bytes of a generation disagree with its manifest."""


class UnsupportedFormatError(RestoreError):
    """A generation was written in a newer format version, or by another library."""


class StateMismatchError(RestoreError):
    """A generation does not fit the program's states; ``problems`` lists each mismatch."""


class CollectiveError(CheckpointError):
    """Ranks never arrived, or failed in a way no other class describes."""
