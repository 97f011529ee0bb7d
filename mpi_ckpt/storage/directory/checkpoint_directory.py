# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory as one job owns it: lock, sweep, newest generation, next number.

Used by root alone, but for `CheckpointDirectory.join`.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from mpi_ckpt.errors import CorruptGenerationError, ReadError, SaveError
from mpi_ckpt.memory import Arena
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.directory.catalog import Catalog
from mpi_ckpt.storage.directory.finding import explain_absence, open_chosen, open_twice
from mpi_ckpt.storage.faults import read_errors_as_save_errors
from mpi_ckpt.storage.format.layout import generation_name, is_partial_of
from mpi_ckpt.storage.owning.ownership import Ownership
from mpi_ckpt.storage.reading.reader import GenerationReader
from mpi_ckpt.storage.writing.partial import Partial

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mpi_ckpt.choice import Choice
    from mpi_ckpt.storage.format.manifest import Manifest
    from mpi_ckpt.storage.owning.lock import DirectoryLock
    from mpi_ckpt.storage.writing.outfile import IOMode

logger = logging.getLogger(__name__)


class CheckpointDirectory:
    """The directory in which a job's generations live. Not thread-safe.

    Nothing is touched until it is owned; a directory that cannot be written to can
    still be restored from.

    Args:
        root: The directory; it and its parents need not exist.
        mode: How files are written; see `create_out_file`.
        ownership: How this job owns it.

    Attributes:
        root: The directory.
        job: A name for this run of the job, in names of partials and in manifests.
        catalog: The published generations.
        is_told_of_size: Whether it was said that manifests have grown large.
        base: Number of an older generation that the next save builds upon, as this job
            has gone back to it; None for the newest. Call `forget_newest` when it changes.
    """

    def __init__(
        self,
        root: Path,
        mode: IOMode = "auto",
        ownership: Ownership = Ownership(),  # noqa: B008 (frozen)
    ) -> None:
        self.root = root
        self._mode: IOMode = mode
        self._ownership = ownership
        self._staging = Arena()
        self.job = secrets.token_hex(6)
        self.catalog = Catalog(root)
        self.is_told_of_size = False
        self._lock: DirectoryLock | None = None
        self._swept = False
        self._aside: dict[int, str] = {}
        self._newest: Manifest | None = None
        self.base: int | None = None

    @property
    def owner(self) -> str:
        """Name of this job where it owns the directory; else empty."""
        return "" if self._lock is None else self.job

    @property
    def set_aside(self) -> dict[str, str]:
        """Path -> reason of each generation that failed to verify in this run."""
        return {
            str(self.root / generation_name(number)): reason
            for number, reason in self._aside.items()
        }

    def own(self) -> None:
        """Make the directory if it is missing, lock it, sweep leftovers. Idempotent.

        Raises:
            LockedError: On the calling rank, if another job holds it.
            OptionsError: On the calling rank, if it is to be read only, or the file system
                has no locks, or no fsync of directories, and the options ask for them.
            SaveError: On the calling rank, if it cannot be written to, or listed.
        """
        if self._lock is not None:
            return
        self._lock = self._ownership.take(self.root, self.job)
        self.catalog.is_owned = True
        self._sweep()
        with suppress(SaveError):  # a disk that was full may have room now
            if self._lock.sign():
                self._sweep()

    def close(self) -> None:
        """Let go of the lock. Callable twice."""
        lock, self._lock = self._lock, None
        self.catalog.is_owned = False
        if lock is not None:
            lock.close()

    def begin(self) -> Partial:
        """Start the next generation, without leftovers; the directory must be owned.

        Raises:
            FencedError: On the calling rank, if another job has taken the directory over.
            WriteError: On the calling rank, if its partial cannot be made.
            SaveError: On the calling rank, if the lock can be neither signed nor read, or
                the directory cannot be listed.
        """
        lock = self._lock
        if lock is None:
            raise SaveError(f"{self.root} is not owned: call own() first", path=self.root)
        if lock.sign():
            self._swept = False  # what others have left until the signature stood
        lock.check()
        if not self._swept:
            self._sweep()
        with read_errors_as_save_errors():
            found = self._survey_without_mine()
        return Partial(
            self.root,
            max(found.next_generation, self.catalog.highest + 1),
            self.job,
            mode=self._mode,
            staging=self._staging,
            check=lock.check,
            sync_names=self._ownership.sync_names,
        )

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove generations; what fails is logged, and swept by the next owner."""
        if self._owns():
            self.catalog.remove(numbers, self.job)

    def join(self, generation: int, job: str) -> Partial:
        """Write into the generation that root of this job has begun.

        Args:
            generation: Its number.
            job: Root's name of the job.
        """
        return Partial(
            self.root,
            generation,
            job,
            mode=self._mode,
            staging=self._staging,
            joined=True,
            sync_names=self._ownership.sync_names,
        )

    def open_newest(self) -> GenerationReader | None:
        """Open the newest generation whose manifest and files look right.

        Returns:
            The open generation; None if nothing was ever saved here.

        Raises:
            CorruptGenerationError: On the calling rank, if there were generations and
                none is good.
            UnsupportedFormatError: On the calling rank, if the newest is of another
                format: going back behind it would lose work in silence.
            LockedError: On the calling rank, if another job holds the directory.
            ReadError: On the calling rank, if the operating system cannot read.
        """
        # Also where nothing was saved yet: of two jobs that start there the second must
        # hear of it now, not when it has trained for hours.
        refused = self._own_if_writable()
        gone: set[int] = set()
        before = None
        while True:
            found = self.catalog.look()
            number = next(
                (n for n in found.generations if n not in gone and n not in self._aside),
                None,
            )
            if number is not None:
                try:
                    return open_twice(self.root / generation_name(number))
                except CorruptGenerationError as problem:
                    self.reject(number, problem)
                except ReadError:
                    if not self.has_lost(number):
                        raise
                gone.add(number)
            # While its owner renames, a directory may be listed with neither name.
            elif self._lock is not None or found == before:
                break
            before = found
        if found.is_missing and refused is not None:
            raise ReadError(
                f"{self.root} is not there, and cannot be made: {refused}. To begin anew "
                "where nobody can save would lose all of it: is the file system mounted, "
                "does a link lead somewhere, is the path right?",
                path=self.root,
            ) from refused
        explain_absence(self.root, found, self._aside)
        return None

    def open(self, choice: Choice, *, proven: bool = False) -> GenerationReader:
        """Open the generation that was asked for, and no other in its place.

        Args:
            choice: What was asked for; not the newest.
            proven: Whether all its bytes are proven first.

        Raises:
            LockedError: On the calling rank, if another job holds the directory.
            RestoreError: On the calling rank, as `open_chosen` does.
        """
        self._own_if_writable()
        return open_chosen(self.catalog, choice, proven=proven)

    def note_published(self, manifest: Manifest, path: Path, manifest_bytes: int) -> None:
        """Remember a generation that this job has just published."""
        self._newest, self.base = manifest, None
        self.catalog.add(manifest, path, manifest_bytes)

    def forget_newest(self) -> None:
        """Let `newest_manifest` look at the disk again."""
        self._newest = None

    def newest_manifest(self) -> Manifest | None:
        """Return the manifest of the generation that the next save builds upon.

        That is the newest good one, None if there is none; or an older one that this job
        has gone back to: what newer ones hold is not of its past.

        Its files may be damaged all the same: only sizes and headers were looked at.

        Raises:
            RestoreError: On the calling rank, if there are generations but no good one.
        """
        if self._newest is None:
            if self.base is None:
                reader = self.open_newest()
            else:
                reader = GenerationReader(self.root / generation_name(self.base))
            if reader is not None:
                with reader:
                    self._newest = reader.manifest
        return self._newest

    def has_lost(self, number: int) -> bool:
        """Return whether a generation is there no more: its owner has pruned it."""
        return recovery.is_gone(self.root / generation_name(number))

    def reject(self, number: int, problem: CorruptGenerationError) -> None:
        """Set a generation aside that failed to verify, and say so.

        One that was pruned while it was looked at is only not used.
        """
        self._newest = None
        self.catalog.spare_left()
        if self.has_lost(number):
            logger.info("generation %d was pruned meanwhile: %s", number, problem)
            return
        self._aside[number] = str(problem)
        where = self.root / generation_name(number)
        if self._owns():
            where = recovery.quarantine(self.root, number, problem)
        logger.warning(
            "generation %d failed to verify and is not used: %s; kept for you in %s",
            number,
            problem,
            where,
        )

    def _owns(self) -> bool:
        try:
            if self._lock is not None:
                self._lock.check()
        except SaveError as error:
            logger.warning("nothing is removed from %s: %s", self.root, error)
            return False
        return self._lock is not None

    def _sweep(self) -> None:
        with read_errors_as_save_errors():
            partials = self.catalog.look().partials
        self._swept = recovery.sweep(self.root, partials, self.job)

    def _survey_without_mine(self) -> recovery.Survey:
        """Look at the directory, without what this job could not delete before."""
        self.catalog.remove_left(self.job)
        found = self.catalog.look()
        # A successor's are not ours to touch.
        mine = tuple(name for name in found.partials if is_partial_of(name, self.job))
        if mine:
            recovery.sweep(self.root, mine, self.job)
            found = self.catalog.look()
        return found

    def _own_if_writable(self) -> SaveError | None:
        """Own the directory, if that can be; return why it cannot."""
        if self._ownership.read_only:
            return SaveError("Options(read_only=True)")
        try:
            self.own()
        except SaveError as error:
            self._ownership.read_without(error)
            return error
        return None
