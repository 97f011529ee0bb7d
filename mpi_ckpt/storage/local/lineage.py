# SPDX-License-Identifier: Apache-2.0
"""Records which run continued from what: the lineage of the local generations.

A host may come back with generations of a run that others have replaced. A generation on a
host therefore counts only if it lies on the way back from the newest run. The lineage is a
small file in the checkpoint directory, which root alone reads and writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mpi_ckpt.errors import CorruptGenerationError, ReadError, SaveError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.format.strict_json import (
    as_integer,
    as_list,
    as_real,
    as_text,
    read_json,
)
from mpi_ckpt.storage.owning.lock import refuse_if_taken_over

if TYPE_CHECKING:
    from pathlib import Path

LINEAGE = "lineage.json"

_FORMAT = "mpi_ckpt lineage 1"
NEW_LINEAGE = ".lineage-"
_BYTES_MAX = 64 << 20
_RUNS_MAX = 64
_COPIED_MAX = 64
_NUMBER_MAX = (1 << 63) - 1


class Origin(NamedTuple):
    """A point in the history of a training.

    Attributes:
        run: The run that saved it; of a generation of the directory the name of the job.
        base: The highest number of a generation in the directory at that time.
        number: Number of the local generation; 0 for the generation ``base`` itself.
    """

    run: str
    base: int
    number: int


@dataclass(frozen=True, slots=True)
class LocalRun:
    """A run that has saved to the hosts.

    Attributes:
        run: Its name.
        job: Name of its job, which its generations in the directory carry.
        origin: What it continued from; None for a fresh start.
        behind: The highest number in a rollback that came before the run; 0 for none.
        settled: Number of the generation of the directory that is newer than all its local
            ones; 0 if it has ended without one.
        path: Where each of its hosts keeps generations, as the program has named it.
        hosts: Names of these hosts; only the newest run of a lineage has them.
    """

    run: str
    job: str
    origin: Origin | None
    behind: int = 0
    settled: int = 0
    path: str = ""
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CopiedGeneration:
    """A generation of the directory that was copied from the hosts.

    It is as old as its source: hosts may keep newer ones, made while it was copied.

    Attributes:
        generation: Its number.
        time: The time in its manifest, by which another one of that number is told apart.
        origin: The local generation.
    """

    generation: int
    time: float
    origin: Origin


@dataclass(frozen=True, slots=True)
class Lineage:
    """The runs that have saved to hosts, oldest first.

    Attributes:
        home: Name of the folder in which each host keeps the generations.
        runs: The runs.
        copied: The generations of the directory that were copied from hosts, oldest first;
            one that was cut off may be among them.
    """

    home: str
    runs: tuple[LocalRun, ...] = ()
    copied: tuple[CopiedGeneration, ...] = ()

    def with_run(self, run: LocalRun) -> Lineage:
        """Return the lineage with a newest run; very old runs fall out. Not collective."""
        older = [replace(one, hosts=()) for one in self.runs if one.run != run.run]
        return replace(self, runs=(*older[1 - _RUNS_MAX :], run))

    def with_copied(self, copied: CopiedGeneration) -> Lineage:
        """Return the lineage with a generation copied from hosts. Not collective."""
        older = [one for one in self.copied if one.generation != copied.generation]
        return replace(self, copied=(*older[1 - _COPIED_MAX :], copied))

    def source(self, generation: int, time: float) -> Origin | None:
        """Return what a generation of the directory was copied from; None if it was not.

        Not collective. Thread-safe.

        Args:
            generation: Its number.
            time: The time in its manifest.
        """
        for one in self.copied:
            if (one.generation, one.time) == (generation, time):
                return one.origin
        return None

    def limits(self) -> dict[str, Origin | None]:
        """Return the runs on the way back from the newest one, newest first.

        Not collective. Thread-safe.

        Returns:
            Run -> its last point on that way; None for the newest run, whose points all
            count.
        """
        found: dict[str, Origin | None] = {}
        known = {one.job: one for one in self.runs}
        known |= {one.run: one for one in self.runs}
        run = self.runs[-1] if self.runs else None
        last: Origin | None = None
        while run is not None and run.run not in found:
            found[run.run] = last
            last = run.origin
            run = None if last is None else known.get(last.run)
        return found


def read_lineage(root: Path) -> Lineage | None:
    """Read the lineage of a checkpoint directory; None if there is none.

    Not collective.

    Raises:
        CorruptGenerationError: On the calling rank, if the file is damaged.
        ReadError: On the calling rank, if the operating system cannot read it.
    """
    path = root / LINEAGE
    try:
        with os_errors_as(ReadError, "reading", path):
            try:
                data = filesystem.read_start(path, _BYTES_MAX)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _decode(data)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptGenerationError(
            f"{path} is damaged ({error}): without it, generations that hosts keep cannot "
            "be ordered. The generations in the directory are not concerned: move this "
            "file elsewhere to go on from them alone",
            path=path,
        ) from error


def write_lineage(root: Path, lineage: Lineage, job: str) -> None:
    """Replace the lineage of a checkpoint directory, durably.

    Not collective. The caller owns the directory.

    Args:
        root: The directory.
        lineage: The lineage.
        job: Name of this job.

    Raises:
        FencedError: On the calling rank, if another job has taken over the directory.
        SaveError: On the calling rank; the previous lineage is still there.
    """
    path, new = root / LINEAGE, root / f"{NEW_LINEAGE}{job}"
    with os_errors_as(SaveError, "writing", path):
        for name in filesystem.list_names(root):
            if name.startswith(NEW_LINEAGE):  # left by a job that was cut off
                filesystem.remove_file(root / name)
        with filesystem.create_file(new) as descriptor:
            filesystem.write_all(descriptor, _encode(lineage), 0)
            filesystem.sync_file(descriptor)
        refuse_if_taken_over(root, job)
        # CRASH: the old lineage or the new one, both whole. A run's entry is durable before
        # its first local generation is named anywhere.
        filesystem.replace_file(new, path)
        filesystem.sync_directory(root, if_possible=True)


def _encode(lineage: Lineage) -> bytes:
    values = {
        "format": _FORMAT,
        "home": lineage.home,
        "runs": [
            {
                "run": one.run,
                "job": one.job,
                "origin": one.origin,
                "behind": one.behind,
                "settled": one.settled,
                "path": one.path,
                "hosts": one.hosts,
            }
            for one in lineage.runs
        ],
        "copied": [(one.generation, one.time, one.origin) for one in lineage.copied],
    }
    text = json.dumps(values, indent=1)
    return f'{{"lineage": {text},\n "digest": "{_digest(text)}"}}\n'.encode()


def _decode(data: bytes) -> Lineage:
    document = read_json(data)
    values = document["lineage"]
    if document["digest"] != _digest(json.dumps(values, indent=1)):
        raise ValueError("it does not match its digest")
    if values["format"] != _FORMAT:
        raise ValueError(f"it is of format {values['format']!r}, not {_FORMAT!r}")
    home = as_text(values["home"])
    if not home or "/" in home or home.startswith("."):
        raise ValueError(f"{home!r} is no name of a folder")
    runs = tuple([_decode_run(one) for one in as_list(values["runs"])])
    # A lineage that was written before there were copies behind the training has none.
    copied = as_list(values.get("copied", []))
    return Lineage(home, runs, tuple([_decode_copied(one) for one in copied]))


def _decode_run(one: dict[str, Any]) -> LocalRun:
    origin = one["origin"]
    return LocalRun(
        as_text(one["run"]),
        as_text(one["job"]),
        None if origin is None else _decode_origin(origin),
        as_integer(one["behind"], _NUMBER_MAX),
        as_integer(one["settled"], _NUMBER_MAX),
        as_text(one["path"]),
        tuple([as_text(host) for host in as_list(one["hosts"])]),
    )


def _decode_copied(one: object) -> CopiedGeneration:
    generation, moment, origin = as_list(one)
    return CopiedGeneration(
        as_integer(generation, _NUMBER_MAX), as_real(moment), _decode_origin(origin)
    )


def _decode_origin(origin: object) -> Origin:
    run, base, number = as_list(origin)
    return Origin(
        as_text(run), as_integer(base, _NUMBER_MAX), as_integer(number, _NUMBER_MAX)
    )


def _digest(text: str) -> str:
    return digest_bytes(text.encode()).hex()
