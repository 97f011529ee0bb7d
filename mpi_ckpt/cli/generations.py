# SPDX-License-Identifier: Apache-2.0
"""Lists the contents of a checkpoint directory for users. Locks and changes nothing.

A job may save and prune at the same time: a generation that vanishes between listing and
reading is reported as ``gone``, and is no error.
"""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from mpi_ckpt.cli.command import BAD, CommandError, misused
from mpi_ckpt.cli.directory_kinds import kind_of
from mpi_ckpt.cli.plain_text import iso_date
from mpi_ckpt.errors import CheckpointError, CorruptGenerationError, UnsupportedFormatError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.format.layout import (
    LOCK,
    QUARANTINE,
    generation_name,
    generation_number,
    lease_name,
)
from mpi_ckpt.storage.owning.lock import TERM_SECONDS, signed_job
from mpi_ckpt.storage.reading.reader import GenerationReader, read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mpi_ckpt.storage.format.manifest import Manifest

_NOTE_BYTES_MAX = 64 << 10
_LOCKS_BYTES = 4 << 20
_WORD_MAX = 255


@dataclass(frozen=True, slots=True)
class Row:
    """One directory that looks like a generation, or like the rest of one.

    Attributes:
        name: Its name in the checkpoint directory.
        state: ``newest``, ``ok``, ``damaged``, ``unreadable``, ``unsupported``,
            ``quarantined``, ``rolled back``, ``partial`` or ``gone``.
        reason: Reason of a bad state.
        manifest: Its manifest, if readable.
        nbytes: Bytes of its files.
        shared: Bytes of its files that have more than one link.
        inodes: Device, number and size of each file.
    """

    name: str
    state: str
    reason: str = ""
    manifest: Manifest | None = None
    nbytes: int = 0
    shared: int = 0
    inodes: frozenset[tuple[int, int, int]] = field(default_factory=frozenset)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        manifest = self.manifest
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason or None,
            "generation": manifest and manifest.generation,
            "step": manifest and manifest.step,
            "time": manifest and manifest.time,
            "saved": manifest and iso_date(manifest.time),
            "ranks": manifest and manifest.size,
            "job": manifest and manifest.job,
            "metrics": dict(manifest.metrics) if manifest else {},
            "bytes": self.nbytes,
            "bytes_shared": self.shared,
        }


def look(root: Path) -> list[Row]:
    """Return everything in a checkpoint directory, oldest first, partials last.

    Raises:
        ReadError: If the directory cannot be listed.
    """
    found = recovery.survey(root)
    rows: list[Row] = []
    newest_seen = False
    for number in found.generations:
        row = _look_at(root / generation_name(number), newest=not newest_seen)
        newest_seen = newest_seen or row.state == "newest"
        rows.append(row)
    rows.reverse()
    rows += [_look_aside(root / QUARANTINE / name) for name in found.quarantined]
    rows += [
        _measured(root / name, name, "rolled back", "", _manifest_of(root / name))
        for name in found.rolled_back
    ]
    rows += [_measured(root / name, name, "partial") for name in found.partials]
    return rows


def newest_of(rows: Iterable[Row]) -> Row | None:
    """Return the generation that a restore takes, if any is good."""
    return next((row for row in rows if row.state == "newest"), None)


def bytes_on_disk(rows: Iterable[Row]) -> int:
    """Return the bytes of all files, each once however many names it has."""
    inodes = {inode for row in rows for inode in row.inodes}
    return sum(size for _, _, size in inodes)


def bytes_freed(removed: Iterable[Row], rows: Iterable[Row]) -> int:
    """Return the bytes of files that only the removed ones of these rows have."""
    doomed = {row.name: row.inodes for row in removed}
    kept = {inode for row in rows if row.name not in doomed for inode in row.inodes}
    gone = {inode for inodes in doomed.values() for inode in inodes} - kept
    return sum(size for _, _, size in gone)


def state_after(path: Path, error: CheckpointError) -> str:
    """Return the state of a generation that could not be opened or read."""
    if recovery.is_gone(path):
        return "gone"
    if isinstance(error, UnsupportedFormatError):
        return "unsupported"
    return "damaged" if isinstance(error, CorruptGenerationError) else "unreadable"


def find_generation(root: Path, wanted: str | None) -> Path:
    """Return the directory of a requested generation.

    Args:
        root: The checkpoint directory, or a generation's own if ``wanted`` is None.
        wanted: Number, name or ``newest``; None for the newest that a restore would use.

    Raises:
        CommandError: If there is none; the message lists those there are.
    """
    if wanted is None and kind_of(root) == "generation":
        return root
    found = recovery.survey(root)
    there = found.generations
    if wanted is None or wanted == "newest":
        return _newest(root)
    number = parse_generation(wanted)
    if number in there:
        return root / generation_name(number)
    listed = ", ".join(map(str, reversed(there[:10]))) or "none"
    more = f" and {len(there) - 10} older" if len(there) > 10 else ""
    hint = ""
    if generation_name(number) in found.quarantined:
        hint = f"; it was set aside: {root / QUARANTINE / generation_name(number)}"
    elif number in found.rolled_back_numbers:
        hint = f"; a rollback has set it aside: mpi-ckpt rollback {quote(str(root))} --undo"
    raise misused(
        f"{root} has no generation {number}{hint}; there: {listed}{more}", "absent"
    )


def find_published(root: Path, wanted: str) -> tuple[int, Path]:
    """Return number and directory of a requested generation that restores may take.

    Raises:
        CommandError: If there is none.
    """
    path = find_generation(root, wanted)
    number = generation_number(path.name)
    if number is None:
        raise CommandError(f"{path} is no published generation")
    return number, path


def parse_generation(wanted: str) -> int:
    """Return the number in a word.

    Raises:
        CommandError: If it has none.
    """
    number = None
    if len(wanted) <= _WORD_MAX:
        number = int(wanted) if wanted.isdecimal() else generation_number(wanted)
    if number is None:
        raise misused(
            f"{wanted!r} is no generation: give a number such as 42, a name such as "
            "checkpoint-00000042, or newest"
        )
    return number


def open_generation(path: Path) -> GenerationReader:
    """Open a generation; see `GenerationReader`.

    Raises:
        CommandError: If it has vanished since it was found.
        CheckpointError: If it is damaged or cannot be read.
    """
    try:
        return GenerationReader(path)
    except CheckpointError as error:
        if not recovery.is_gone(path):
            raise
        raise CommandError(
            f"{path} is gone: a job has pruned it, or set it aside, since it was listed",
            kind="gone",
        ) from error


def open_wanted(root: Path, wanted: str | None) -> GenerationReader:
    """Open a requested generation; see `find_generation`.

    If the newest is requested and pruned before it is open, a newer one exists.

    Raises:
        CommandError: If there is none, or it has vanished since it was found.
        CheckpointError: If it is damaged or cannot be read.
    """
    before = None
    while True:
        path = find_generation(root, wanted)
        try:
            return open_generation(path)
        except CommandError:
            if wanted not in (None, "newest") or path == before:
                raise
        before = path


def lock_holder(root: Path) -> str | None:
    """Return which process uses a directory, without taking its lock.

    It holds the lock on this host, or has renewed its lease within a term by the clock of
    the file system. Jobs on other hosts that hold the lock are not seen.
    """
    try:
        status = (root / LOCK).lstat()
        table = _read_note(Path("/proc/locks"), _LOCKS_BYTES)
        if _has_fresh_lease(root):
            return _read_note(root / LOCK, 500).strip()
    except (OSError, ValueError):
        return None
    # "1: FLOCK  ADVISORY  WRITE 4711 08:02:5230 0 EOF": device in hexadecimal.
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    if not any("FLOCK" in line and f" {device} " in line for line in table.splitlines()):
        return None
    try:
        return _read_note(root / LOCK, 500).strip() or "a job that left no name"
    except (OSError, ValueError):
        return "a job whose name cannot be read"


def _has_fresh_lease(root: Path) -> bool:
    job = signed_job(root)
    if job is None:
        return False
    try:
        renewed = (root / lease_name(job)).lstat().st_mtime
    except FileNotFoundError:
        return False
    return abs(time.time() - renewed) < TERM_SECONDS


def reason_of(path: Path) -> str:
    """Return the noted reason why a generation was quarantined."""
    try:
        note = json.loads(_read_note(path / "reason.json", _NOTE_BYTES_MAX))
        return str(note["reason"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "no reason is noted"


def _newest(root: Path) -> Path:
    problems: dict[int, str] = {}  # without generations that are gone
    while there := [n for n in recovery.survey(root).generations if n not in problems]:
        path = root / generation_name(there[0])
        try:
            GenerationReader(path).close()
        except CheckpointError as error:
            problems[there[0]] = "" if recovery.is_gone(path) else str(error)
        else:
            return path
    bad = [problem for problem in problems.values() if problem]
    if bad:
        raise CommandError(
            f"no generation in {root} is good:\n  " + "\n  ".join(bad),
            code=BAD,
            kind="damaged",
        )
    raise misused(f"{root} holds no generation", "absent")


def _look_at(path: Path, *, newest: bool) -> Row:
    try:
        with GenerationReader(path) as reader:
            state = "newest" if newest else "ok"
            return _measured(path, path.name, state, manifest=reader.manifest)
    except CheckpointError as error:
        state = state_after(path, error)
        reason = "" if state == "gone" else str(error)
        return _measured(path, path.name, state, reason, _manifest_of(path))


def _look_aside(path: Path) -> Row:
    name = f"{QUARANTINE}/{path.name}"
    return _measured(path, name, "quarantined", reason_of(path), _manifest_of(path))


def _manifest_of(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except CheckpointError:
        return None


def _measured(
    path: Path, name: str, state: str, reason: str = "", manifest: Manifest | None = None
) -> Row:
    inodes = set()
    shared = 0
    try:
        names = filesystem.list_names(path)
    except OSError:
        names = []
    for file_name in names:
        try:
            status = (path / file_name).lstat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            inodes.add((status.st_dev, status.st_ino, status.st_size))
            shared += status.st_size if status.st_nlink > 1 else 0
    if not names and recovery.is_gone(path):
        state, reason = "gone", ""
    nbytes = sum(size for _, _, size in inodes)
    return Row(name, state, reason, manifest, nbytes, shared, frozenset(inodes))


def _read_note(path: Path, most: int) -> str:
    return filesystem.read_start(path, most).decode(errors="replace")
