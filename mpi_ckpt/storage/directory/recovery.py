# SPDX-License-Identifier: Apache-2.0
"""Surveys a checkpoint directory, sweeps leftovers, and quarantines bad generations.

Called by root alone. The disk is the only truth: nothing but the generations themselves
persists between runs.
"""

from __future__ import annotations

import errno
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.errors import ReadError, SaveError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import in_words, os_errors_as
from mpi_ckpt.storage.format.layout import (
    GENERATION_MAX,
    QUARANTINE,
    condemned_name,
    generation_name,
    generation_number,
    is_adaptdl_name,
    is_condemned_name,
    is_partial_name,
    is_partial_of,
    partial_number,
    pinned_number,
    rolled_back_numbers,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.errors import CheckpointError, CorruptGenerationError

logger = logging.getLogger(__name__)

_REASON = "reason.json"
_LOOKS_MORE = 3


@dataclass(frozen=True, slots=True)
class Survey:
    """The contents of a checkpoint directory.

    Attributes:
        generations: Numbers of the published generations, newest first.
        partials: Names of leftovers of interrupted writes and removals.
        quarantined: Names of the quarantined generations.
        rolled_back: Names of the generations set aside by a rollback.
        pinned: Numbers of the pinned generations; some may not exist any more.
        adaptdl: Names of checkpoints in adaptdl's format.
        unlisted: Why the quarantined generations are unknown; empty if they are known.
        is_missing: Whether the directory itself does not exist.
    """

    generations: tuple[int, ...] = ()
    partials: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    rolled_back: tuple[str, ...] = ()
    pinned: frozenset[int] = frozenset()
    adaptdl: tuple[str, ...] = ()
    unlisted: str = ""
    is_missing: bool = False

    @property
    def highest_published(self) -> int:
        """The highest number that a generation has or had; 0 for none."""
        quarantined = [
            number
            for name in self.quarantined
            if (number := generation_number(name.partition("~")[0])) is not None
        ]
        back = [n for name in self.rolled_back for n in rolled_back_numbers(name) or ()]
        return max([0, *self.generations, *quarantined, *back])

    @property
    def highest(self) -> int:
        """The highest number that a generation or leftover has or had; 0 for none."""
        left = [partial_number(name) for name in self.partials]
        return max([self.highest_published, *left])

    @property
    def rolled_back_numbers(self) -> frozenset[int]:
        """Numbers of the generations set aside by a rollback."""
        pairs = map(rolled_back_numbers, self.rolled_back)
        return frozenset(pair[0] for pair in pairs if pair)

    @property
    def last_rollback(self) -> int:
        """The highest number that any generation had at a rollback; 0 for none."""
        pairs = map(rolled_back_numbers, self.rolled_back)
        return max([0, *(pair[1] for pair in pairs if pair)])

    @property
    def next_generation(self) -> int:
        """A number that no generation or leftover has or had, as far as known.

        Raises:
            SaveError: On the calling rank, if no number is left.
        """
        if self.highest >= GENERATION_MAX:
            raise SaveError(
                f"{generation_name(self.highest)} exists, and a name can hold no higher "
                "number: no job saves that often, so move it elsewhere; nothing was "
                "published"
            )
        return self.highest + 1


def survey(root: Path) -> Survey:
    """Survey a checkpoint directory; a missing one is empty.

    Not collective. Unknown names are ignored. It finds the good generations even if another
    program made the quarantine directory.

    Raises:
        ReadError: On the calling rank, if it cannot be listed.
    """
    with os_errors_as(ReadError, "listing", root):
        try:
            names = filesystem.list_names(root)
        except FileNotFoundError:
            return Survey(is_missing=True)
    quarantined, unlisted = (
        _set_aside(root / QUARANTINE) if QUARANTINE in names else ([], "")
    )
    numbers = [n for name in names if (n := generation_number(name)) is not None]
    return Survey(
        generations=tuple(sorted(numbers, reverse=True)),
        partials=tuple(name for name in names if is_partial_name(name)),
        quarantined=tuple(quarantined),
        rolled_back=tuple(name for name in names if rolled_back_numbers(name)),
        pinned=frozenset(n for name in names if (n := pinned_number(name)) is not None),
        adaptdl=tuple(name for name in names if is_adaptdl_name(name)),
        unlisted=unlisted,
    )


def settled_survey(root: Path) -> Survey:
    """Survey a checkpoint directory until two surveys agree, a few times at most.

    Not collective. For callers that have nothing to compare a listing with, which may be
    old.

    Raises:
        ReadError: On the calling rank, if it cannot be listed.
    """
    found = survey(root)
    for _ in range(_LOOKS_MORE):  # while a job saves, no two may agree
        before, found = found, survey(root)
        if found == before:
            break
    return found


def is_gone(path: Path) -> bool:
    """Return whether a generation has lost its name: its owner pruned or quarantined it.

    Not collective. Its files are deleted after its name, so if they can no longer be read,
    this is true.
    """
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _set_aside(shelf: Path) -> tuple[list[str], str]:
    try:
        _refuse_foreign(shelf)
        return filesystem.list_names(shelf), ""
    except OSError as error:
        return [], f"{shelf} cannot be listed: {in_words(error)}"


def _refuse_foreign(shelf: Path) -> None:
    # A link could send generations to any place.
    if shelf.is_symlink() or (shelf.exists() and not shelf.is_dir()):
        raise NotADirectoryError(
            errno.ENOTDIR, "is not a directory that mpi_ckpt made", str(shelf)
        )


def sweep(root: Path, partials: tuple[str, ...], job: str) -> bool:
    """Delete leftovers; log those that cannot be deleted, which stay for the next sweep.

    Not collective. The caller holds the lock, and has signed it.

    Args:
        root: The checkpoint directory.
        partials: Names of the leftovers.
        job: Name of the job that deletes them.

    Returns:
        Whether no leftover stays.
    """
    if not partials:
        return True
    condemned = _condemn(root, partials, job)
    try:
        # CRASH: a leftover may be a generation that is being removed. If its files vanished
        # before that rename is durable, it would be back under its name with files missing.
        filesystem.sync_directory(root, if_possible=True)
    except OSError as error:
        logger.warning("leftovers in %s are not removed: %s", root, error)
        return False
    stay = condemned.count(None)
    for name in filter(None, condemned):
        try:
            filesystem.remove_tree(root / name)
        except OSError as error:
            stay += 1
            logger.warning("%s, a leftover, cannot be removed: %s", root / name, error)
        else:
            logger.info("removed %s, left by a run that was cut off", root / name)
    return stay == 0


def _condemn(root: Path, partials: tuple[str, ...], job: str) -> list[str | None]:
    """Return the names under which to delete leftovers; None for one that cannot be."""
    # INVARIANT: the writer of a leftover may be alive, cut off, and about to publish it.
    # This rename comes before its rename or after it: it has published all, or never will.
    # If files were deleted first, it could publish the rest.
    moved: list[str | None] = []
    for name in partials:
        safe = is_condemned_name(name) or is_partial_of(name, job)
        target = name if safe else condemned_name(name, job)
        try:
            if not safe:
                filesystem.rename_new(root / name, root / target)
            moved.append(target)
        except FileNotFoundError:
            if not is_gone(root / name):
                moved.append(None)  # logged already: it stays for the next sweep
            logger.info("%s was published, or removed, at the last moment", root / name)
        except OSError as error:
            moved.append(None)
            logger.warning("%s, a leftover, cannot be removed: %s", root / name, error)
    return moved


def quarantine(root: Path, generation: int, problem: CorruptGenerationError) -> Path:
    """Quarantine a generation with the reason; nothing is deleted.

    Not collective. The caller holds the lock.

    Returns:
        Its new path; its old path if it could not be moved.
    """
    source = root / generation_name(generation)
    shelf = root / QUARANTINE
    target = shelf / source.name
    try:
        target = _free_place(shelf, source.name)
        reason = json.dumps({"generation": generation, "reason": str(problem)})
        filesystem.rename_new(source, target)
        # CRASH: the new name becomes durable before the old name is durably gone: a power
        # cut leaves the generation under one of them at least. The reason comes last: a
        # generation without a reason is quarantined all the same.
        filesystem.sync_directory(shelf, if_possible=True)
        filesystem.sync_directory(root, if_possible=True)
        _leave_reason(target, reason.encode())
    except OSError as error:
        logger.warning("%s could not be set aside: %s", source, error)
        return source if source.exists() else target
    return target


def quarantine_file(
    root: Path, generation: int, name: str, problem: CheckpointError
) -> Path:
    """Quarantine one file of a local generation: other hosts have copies of it.

    Not collective. The caller holds the lock.

    Returns:
        Its new path; its old path if it could not be moved.
    """
    source = root / generation_name(generation) / name
    target = source
    try:
        folder = _free_place(root / QUARANTINE, generation_name(generation))
        reason = {"generation": generation, "file": name, "reason": str(problem)}
        filesystem.make_directory(folder)
        target = folder / name
        filesystem.rename_new(source, target)
        # CRASH: a power cut may bring the file back under its old name; it is then found
        # bad again.
        filesystem.sync_directory(folder, if_possible=True)
        filesystem.sync_directory(source.parent, if_possible=True)
        _leave_reason(folder, json.dumps(reason).encode())
    except OSError as error:
        logger.warning("%s could not be set aside: %s", source, error)
        return target if target.exists() else source
    return target


def _free_place(shelf: Path, name: str) -> Path:
    _refuse_foreign(shelf)
    filesystem.make_directories(shelf)
    target, attempt = shelf / name, 1
    while target.is_symlink() or target.exists():
        attempt += 1
        target = shelf / f"{name}~{attempt}"
    return target


def _leave_reason(target: Path, reason: bytes) -> None:
    if not target.is_dir() or target.is_symlink():
        return
    with filesystem.create_file(target / _REASON) as descriptor:
        filesystem.write_all(descriptor, reason, 0)
        filesystem.sync_file(descriptor)
