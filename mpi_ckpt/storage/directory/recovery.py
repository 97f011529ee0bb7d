# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint directory: looked at, swept, set aside.

Called by root alone. What disk holds is the only truth: nothing is remembered between
runs but the generations themselves.
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
    rolled_back_numbers,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.errors import CorruptGenerationError

logger = logging.getLogger(__name__)

_REASON = "reason.json"
_LOOKS_MORE = 3


@dataclass(frozen=True, slots=True)
class Survey:
    """What a look at a checkpoint directory found.

    Attributes:
        generations: Numbers of the published generations, newest first.
        partials: Names of leftovers of writes and removals that were cut off.
        quarantined: Names of the generations that were set aside.
        rolled_back: Names of those that somebody has gone back behind.
        adaptdl: Names of checkpoints in adaptdl's format.
        unlisted: Why it cannot be said what was set aside; empty if it can.
        is_missing: Whether the directory itself is not there.
    """

    generations: tuple[int, ...] = ()
    partials: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    rolled_back: tuple[str, ...] = ()
    adaptdl: tuple[str, ...] = ()
    unlisted: str = ""
    is_missing: bool = False

    @property
    def highest_published(self) -> int:
        """The highest number that a generation has or had; 0 for none."""
        aside = [
            number
            for name in self.quarantined
            if (number := generation_number(name.partition("~")[0])) is not None
        ]
        back = [n for name in self.rolled_back for n in rolled_back_numbers(name) or ()]
        return max([0, *self.generations, *aside, *back])

    @property
    def highest(self) -> int:
        """The highest number that a generation or leftover has or had; 0 for none."""
        left = [partial_number(name) for name in self.partials]
        return max([self.highest_published, *left])

    @property
    def rolled_back_numbers(self) -> frozenset[int]:
        """Numbers of the generations that somebody has gone back behind."""
        pairs = map(rolled_back_numbers, self.rolled_back)
        return frozenset(pair[0] for pair in pairs if pair)

    @property
    def next_generation(self) -> int:
        """A number that no generation or leftover has or had, as far as one can tell.

        Raises:
            SaveError: On the calling rank, if no name is left for one.
        """
        if self.highest >= GENERATION_MAX:
            raise SaveError(
                f"there is a {generation_name(self.highest)}, and no higher number has a "
                "name: nobody saved that often, so move it elsewhere; nothing was published"
            )
        return self.highest + 1


def survey(root: Path) -> Survey:
    """Look at a checkpoint directory; a missing one is empty.

    Not collective. Names of no known form are ignored. What is good is found also where
    the quarantine is of somebody else's making.

    Raises:
        ReadError: On the calling rank, if it cannot be listed.
    """
    with os_errors_as(ReadError, "listing", root):
        try:
            names = filesystem.list_names(root)
        except FileNotFoundError:
            return Survey(is_missing=True)
    aside, unlisted = _set_aside(root / QUARANTINE) if QUARANTINE in names else ([], "")
    numbers = [n for name in names if (n := generation_number(name)) is not None]
    return Survey(
        generations=tuple(sorted(numbers, reverse=True)),
        partials=tuple(name for name in names if is_partial_name(name)),
        quarantined=tuple(aside),
        rolled_back=tuple(name for name in names if rolled_back_numbers(name)),
        adaptdl=tuple(name for name in names if is_adaptdl_name(name)),
        unlisted=unlisted,
    )


def settled_survey(root: Path) -> Survey:
    """Look at a checkpoint directory until two looks agree, some times at most.

    Not collective. For who has nothing to compare a listing with, which may be an old one.

    Raises:
        ReadError: On the calling rank, if it cannot be listed.
    """
    found = survey(root)
    for _ in range(_LOOKS_MORE):  # beside a job that saves no two may agree
        before, found = found, survey(root)
        if found == before:
            break
    return found


def is_gone(path: Path) -> bool:
    """Return whether a generation has lost its name: pruned, or set aside, by its owner.

    Not collective. Its files go after its name, so whoever cannot read it any more finds
    this true.
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
    # Through a link generations would go wherever whoever made it likes.
    if shelf.is_symlink() or (shelf.exists() and not shelf.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, "is no directory of ours", str(shelf))


def sweep(root: Path, partials: tuple[str, ...], job: str) -> bool:
    """Delete leftovers; what cannot be deleted is told, and stays for the next sweep.

    Not collective. The caller holds the lock, and has signed it.

    Args:
        root: The checkpoint directory.
        partials: Names of the leftovers.
        job: Name of the job that deletes them.

    Returns:
        Whether none stays.
    """
    if not partials:
        return True
    condemned = _condemn(root, partials, job)
    try:
        # CRASH: a leftover may be a generation on its way out. If its files went before
        # that rename is durable, it would be back under its name with files missing.
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
    """Return under which names leftovers can be deleted; None for one that cannot."""
    # INVARIANT: whoever wrote one of them may live, cut off, and be about to publish it.
    # One rename is before its rename or after: it has published all, or never will. If
    # files were deleted first, it could publish what is left.
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
                moved.append(None)  # said once, and not so: it stays for the next sweep
            logger.info("%s was published, or removed, at the last moment", root / name)
        except OSError as error:
            moved.append(None)
            logger.warning("%s, a leftover, cannot be removed: %s", root / name, error)
    return moved


def quarantine(root: Path, generation: int, problem: CorruptGenerationError) -> Path:
    """Set a generation aside with the reason; nothing is deleted.

    Not collective. The caller holds the lock.

    Returns:
        Where it is now; its old place if it could not be moved.
    """
    source = root / generation_name(generation)
    shelf = root / QUARANTINE
    target = shelf / source.name
    try:
        _refuse_foreign(shelf)
        filesystem.make_directories(shelf)
        attempt = 1
        while target.is_symlink() or target.exists():
            attempt += 1
            target = shelf / f"{source.name}~{attempt}"
        reason = json.dumps({"generation": generation, "reason": str(problem)})
        filesystem.rename_new(source, target)
        filesystem.sync_directory(shelf, if_possible=True)
        filesystem.sync_directory(root, if_possible=True)
        _leave_reason(target, reason.encode())
    except OSError as error:
        logger.warning("%s could not be set aside: %s", source, error)
        return source if source.exists() else target
    return target


def _leave_reason(target: Path, reason: bytes) -> None:
    if not target.is_dir() or target.is_symlink():
        return
    with filesystem.create_file(target / _REASON) as descriptor:
        filesystem.write_all(descriptor, reason, 0)
        filesystem.sync_file(descriptor)
