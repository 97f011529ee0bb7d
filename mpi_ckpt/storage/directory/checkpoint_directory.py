# SPDX-License-Identifier: Apache-2.0
"""Manages a job's checkpoint directory: lock, sweep, newest generation, next number.

Used by root alone, except `CheckpointDirectory.join`.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from mpi_ckpt.errors import CorruptGenerationError, ReadError, SaveError
from mpi_ckpt.memory import Arena
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.directory.catalog import Catalog
from mpi_ckpt.storage.directory.finding import (
    explain_absence,
    open_chosen,
    open_twice,
    refuse_generation,
    refuse_part,
)
from mpi_ckpt.storage.directory.pins import bring_back_pinned
from mpi_ckpt.storage.faults import read_errors_as_save_errors
from mpi_ckpt.storage.format.layout import generation_name, is_partial_of
from mpi_ckpt.storage.owning.lock import refuse_if_taken_over
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
    """The directory of a job's generations. Not thread-safe.

    Nothing is changed until the job owns the directory. A job can restore from a directory
    that it cannot write to.

    Args:
        root: The directory; it and its parents need not exist.
        mode: How files are written; see `create_out_file`.
        ownership: How this job owns it.

    Attributes:
        root: The directory.
        job: A name for this run of the job, in names of partials and in manifests.
        catalog: The published generations.
        has_warned_of_size: Whether a warning of large manifests was logged.
        base: Number of an older generation that the next save builds on, after this job
            went back to it; None for the newest. Call `forget_newest` when it changes.
        goes_on: False until a job that should restore before it saves has done so; true for
            a writer of single generations.
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
        self._staging = Arena(huge_pages=True)
        self.job = secrets.token_hex(6)
        self.catalog = Catalog(root)
        self.has_warned_of_size = False
        self._lock: DirectoryLock | None = None
        self._swept = False
        self._aside: dict[int, str] = {}
        self._newest: Manifest | None = None
        self.base: int | None = None
        self.goes_on = True

    @property
    def owner(self) -> str:
        """Name of this job if it owns the directory; else empty."""
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
                lacks locks or the fsync of directories that the options ask for.
            SaveError: On the calling rank, if it cannot be written to, or listed.
        """
        if self._lock is not None:
            return
        refuse_generation(self.root)
        self._lock = self._ownership.take(self.root, self.job)
        self.catalog.is_owned = True
        self._sweep()
        with suppress(SaveError):  # a full disk may have space now
            if self._lock.sign():
                self._sweep()

    def close(self) -> None:
        """Release the lock. Callable twice."""
        lock, self._lock = self._lock, None
        self.catalog.is_owned = False
        if lock is not None:
            lock.close()

    def begin(self, at_least: int = 0) -> Partial:
        """Start the next generation, of a number of ``at_least`` or more.

        The directory must be owned. Leftovers are gone.

        Raises:
            FencedError: On the calling rank, if another job has taken over the directory.
            WriteError: On the calling rank, if its partial cannot be made.
            SaveError: On the calling rank, if the lock can neither be signed nor read, or
                the directory cannot be listed.
        """
        lock = self._lock
        if lock is None:
            raise SaveError(f"{self.root} is not owned: call own() first", path=self.root)
        if lock.sign():
            self._swept = False  # other jobs may have left partials until the signature
        lock.check()
        if not self._swept:
            self._sweep()
        with read_errors_as_save_errors():
            found = self._survey_without_mine()
        self._warn_of_unrestored(found)
        return Partial(
            self.root,
            max(found.next_generation, self.catalog.highest + 1, at_least),
            self.job,
            mode=self._mode,
            staging=self._staging,
            check=lock.check,
            sync_names=self._ownership.sync_names,
        )

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove generations; log failures, which the next owner sweeps."""
        if self._owns():
            self.catalog.remove(numbers, self.job)

    def join(self, generation: int, job: str) -> Partial:
        """Open the generation that this job's root has begun, to write into it.

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
            check=partial(refuse_if_taken_over, self.root, job),
            sync_names=self._ownership.sync_names,
        )

    def open_newest(self, *, tiles_later: bool = False) -> GenerationReader | None:
        """Open the newest generation whose manifest and files look right.

        Args:
            tiles_later: As for `GenerationReader`.

        Returns:
            The open generation; None if nothing was ever saved here.

        Raises:
            CorruptGenerationError: On the calling rank, if there were generations and none
                is good.
            UnsupportedFormatError: On the calling rank, if the newest has another format:
                going back further would silently lose work.
            LockedError: On the calling rank, if another job holds the directory.
            ReadError: On the calling rank, if the operating system cannot read.
        """
        # Also if nothing was saved yet: if two jobs start here, the second must fail now,
        # not after training for hours.
        refuse_generation(self.root)
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
                    path = self.root / generation_name(number)
                    return refuse_part(open_twice(path, tiles_later=tiles_later))
                except CorruptGenerationError as problem:
                    self.reject(number, problem)
                except ReadError:
                    if not self.has_lost(number):
                        raise
                gone.add(number)
            # During a rename by its owner, a listing may show neither name.
            elif self._lock is not None or found == before:
                break
            before = found
        if found.is_missing and refused is not None:
            raise ReadError(
                f"{self.root} does not exist and cannot be made: {refused}. A training "
                "that began anew could not save anything there: is the file system "
                "mounted, does a link lead somewhere, is the path right?",
                path=self.root,
            ) from refused
        explain_absence(self.root, found, self._aside)
        return None

    def open(self, choice: Choice, *, proven: bool = False) -> GenerationReader:
        """Open the requested generation, and no other in its place.

        Args:
            choice: The request; not the newest.
            proven: Whether to prove all its bytes first.

        Raises:
            LockedError: On the calling rank, if another job holds the directory.
            RestoreError: On the calling rank, as `open_chosen` does.
        """
        self._own_if_writable()
        return open_chosen(self.catalog, choice, proven=proven)

    def note_published(self, manifest: Manifest, path: Path, manifest_bytes: int) -> None:
        """Note a generation that this job has just published."""
        self._newest, self.base = manifest, None
        self.catalog.add(manifest, path, manifest_bytes)

    def forget_newest(self) -> None:
        """Make `newest_manifest` read the disk again."""
        self._newest = None

    def newest_manifest(self) -> Manifest | None:
        """Return the manifest of the generation that the next save builds on.

        That is the newest good generation, None if there is none; or an older one that this
        job has gone back to, since newer generations are not part of its past.

        Its files may still be damaged: only sizes and headers were checked.

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
        """Return whether a generation is gone: its owner has pruned it."""
        return recovery.is_gone(self.root / generation_name(number))

    def reject(self, number: int, problem: CorruptGenerationError) -> None:
        """Quarantine a generation that failed to verify, and log it.

        A generation that was pruned while it was read is only skipped.
        """
        self._newest = None
        self.catalog.cancel_removals()
        if self.has_lost(number):
            logger.info("generation %d was pruned meanwhile: %s", number, problem)
            return
        self._aside[number] = str(problem)
        where = self.root / generation_name(number)
        if self._owns():
            where = recovery.quarantine(self.root, number, problem)
        logger.warning(
            "generation %d failed to verify and is not used: %s; it is kept in %s",
            number,
            problem,
            where,
        )

    def _warn_of_unrestored(self, found: recovery.Survey) -> None:
        if found.generations and not self.goes_on:
            logger.warning(
                "%s holds generation %d of another run, of which this run has restored "
                "nothing, and retention removes the older ones: call manager.restore() "
                "before the training, or give this run a directory of its own",
                self.root,
                found.generations[0],
            )
        self.goes_on = True  # told once

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
        partials = bring_back_pinned(self.root, partials)
        self._swept = recovery.sweep(self.root, partials, self.job)

    def _survey_without_mine(self) -> recovery.Survey:
        """Survey the directory, without leftovers that this job could not delete before."""
        self.catalog.retry_removals(self.job)
        found = self.catalog.look()
        # A successor's partials must not be touched.
        mine = tuple(name for name in found.partials if is_partial_of(name, self.job))
        if mine:
            recovery.sweep(self.root, bring_back_pinned(self.root, mine), self.job)
            found = self.catalog.look()
        return found

    def _own_if_writable(self) -> SaveError | None:
        """Own the directory if possible; return the reason if not."""
        if self._ownership.read_only:
            return SaveError("Options(read_only=True)")
        try:
            self.own()
        except SaveError as error:
            self._ownership.read_without(error)
            return error
        return None
