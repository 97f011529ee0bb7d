# SPDX-License-Identifier: Apache-2.0
"""Lists the published generations, and removes those retention gives up. Root alone.

A listing can be wrong: an automount shows nothing yet, a network file system shows an old
state, a directory was moved away and is back. If a listing shows less than is known, the
catalog lists again, and refuses it in the end: a job that believed it would restart the
numbering, and retention would treat the generation just acknowledged as the oldest.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from mpi_ckpt.errors import CheckpointError, ReadError
from mpi_ckpt.reports import GenerationInfo
from mpi_ckpt.retention import (
    GenerationSummary,
    RetentionPolicy,
    metric_names,
    select_kept,
    unmet_policies,
)
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory.pins import is_pinned
from mpi_ckpt.storage.directory.recovery import is_gone, settled_survey, survey
from mpi_ckpt.storage.format.layout import MANIFEST, generation_name, partial_name
from mpi_ckpt.storage.reading.reader import read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from mpi_ckpt.storage.directory.recovery import Survey
    from mpi_ckpt.storage.format.manifest import Manifest

logger = logging.getLogger(__name__)

_PAUSES_SECONDS = (0.05, 0.2, 1.0)


class Catalog:
    """The published generations of a directory, each manifest read once.

    Not thread-safe. The disk is the truth: the catalog only avoids reading twice.

    Args:
        root: The directory.

    Attributes:
        root: The directory.
        is_owned: Whether this job owns the directory, which must then exist.
        highest: The highest number of a generation seen so far, quarantined or not.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._warned_metrics: set[str] = set()
        self._known: dict[int, GenerationInfo] = {}
        self._to_remove: list[int] = []
        self._policy_to_retry: RetentionPolicy | None = None
        self._seen: set[int] = set()
        self._pinned: frozenset[int] = frozenset()
        self._looked = False
        self.is_owned = False
        self.highest = 0

    @property
    def count(self) -> int:
        """Number of the generations that `generations` found last, or that were added."""
        return len(self._known)

    def look(self) -> Survey:
        """List the directory; list again if it shows less than is known.

        Not collective.

        Raises:
            ReadError: On the calling rank, if it cannot be listed, or still shows less.
        """
        for pause in (*_PAUSES_SECONDS, None):
            found = survey(self.root) if self._looked else settled_survey(self.root)
            self._looked = True
            hidden = self._hidden(found)
            if not hidden:
                break
            if pause is None:
                raise ReadError(
                    f"{self.root} {hidden}; nothing is written there until this has "
                    "changed: is the file system mounted, was the directory moved?",
                    path=self.root,
                )
            logger.warning("%s %s: looking again", self.root, hidden)
            time.sleep(pause)
        # Generations that only an old listing shows would count as missing as long as the
        # job lives.
        self._seen = {
            n
            for n in found.generations
            if n in self._seen or not is_gone(self.root / generation_name(n))
        }
        self.highest = max(self.highest, found.highest_published)
        self._pinned = found.pinned
        return found

    def _hidden(self, found: Survey) -> str:
        """Return in words the known generations that a listing did not show."""
        if found.is_missing:
            return "does not show itself, though this job owns it" if self.is_owned else ""
        missing = sorted(self._seen - set(found.generations))
        # A generation that was removed, by its owner or by hand, has no name; a listing
        # that is only old still shows others of this job.
        there = [n for n in missing if not is_gone(self.root / generation_name(n))]
        if there:
            return f"does not show generations {there}, which exist"
        is_empty = not (found.generations or found.quarantined or found.rolled_back)
        if self.is_owned and missing and is_empty:
            return f"does not show any generation, though this job has seen {missing} there"
        return ""

    def add(self, manifest: Manifest, path: Path, manifest_bytes: int) -> None:
        """Add a generation whose manifest is already read. Not collective."""
        self._seen.add(manifest.generation)
        self.highest = max(self.highest, manifest.generation)
        self._known[manifest.generation] = GenerationInfo(
            generation=manifest.generation,
            path=path,
            step=manifest.step,
            time=manifest.time,
            size=manifest.size,
            nbytes=manifest_bytes + sum(file.nbytes for file in manifest.files),
            metrics=manifest.metrics,
            job=manifest.job,
        )

    def generations(self) -> list[GenerationInfo]:
        """Return the generations, oldest first, without unreadable ones.

        Not collective.

        Raises:
            ReadError: On the calling rank, if the directory cannot be listed.
        """
        present = sorted(self.look().generations)
        self._known = {n: info for n, info in self._known.items() if n in present}
        for number in present:
            if number not in self._known:
                self._read(number)
        return [self._known[number] for number in present if number in self._known]

    def summaries(self) -> list[GenerationSummary]:
        """Return the summaries of all generations, oldest first. Not collective.

        Raises:
            ReadError: On the calling rank, if the directory cannot be listed.
        """
        return [
            GenerationSummary(info.generation, info.step, info.metrics)
            for info in self.generations()
        ]

    def choose(self, policy: RetentionPolicy) -> tuple[int, ...]:
        """Return the numbers that a policy gives up; on failure log it and give up none.

        Not collective. If the directory could not be listed, `retry_removals` asks the
        policy again.
        """
        # The newest generation is durable: no later failure may fail the save.
        self._policy_to_retry = policy
        try:
            there = self.summaries()
            self._policy_to_retry = None
            kept = select_kept(policy, there) | self._pinned
        except Exception:
            logger.exception("retention failed; nothing is removed")
            return ()
        given_up = tuple(
            summary.generation for summary in there if summary.generation not in kept
        )
        if given_up:
            self._warn_of_unknown_metrics(policy, there)
        return given_up

    def remove(self, numbers: Iterable[int], job: str) -> None:
        """Remove generations; log failures, which `retry_removals` tries again.

        Not collective. The caller holds the lock.
        """
        doomed: list[Path] = []
        self._to_remove = list(numbers)
        try:
            while self._to_remove:
                number = self._to_remove[0]
                source = self.root / generation_name(number)
                target = self.root / partial_name(number, job)
                filesystem.rename_new(source, target)
                if is_pinned(self.root, number):  # since it was chosen: see `pins`
                    filesystem.rename_new(target, source)
                else:
                    self._known.pop(number, None)
                    self._seen.discard(number)
                    doomed.append(target)
                del self._to_remove[0]
            if doomed:
                # CRASH: files may vanish before the rename is durable; a generation would
                # be back under its name with files missing.
                filesystem.sync_directory(self.root, if_possible=True)
            for path in doomed:
                filesystem.remove_tree(path)
        except OSError as error:
            logger.warning("old generations were not all removed: %s", error)

    def retry_removals(self, job: str) -> None:
        """Remove generations that could not be chosen or removed before a save needs space.

        Not collective. The caller holds the lock.

        Raises:
            ReadError: On the calling rank, if the directory cannot be listed.
        """
        if self._policy_to_retry is not None:
            self._to_remove = list(self.choose(self._policy_to_retry))
        if not self._to_remove:
            return
        present = self.look().generations
        left = [number for number in self._to_remove if number in present]
        if left and present[0] not in left:
            self.remove(left, job)

    def cancel_removals(self) -> None:
        """Cancel pending removals, as a newer generation is bad. Not collective."""
        self._to_remove, self._policy_to_retry = [], None

    def _warn_of_unknown_metrics(
        self, policy: RetentionPolicy, there: Sequence[GenerationSummary]
    ) -> None:
        # Not before a generation is given up: a later save may bring the metric.
        for unmet in unmet_policies(policy, there):
            if unmet.metric in self._warned_metrics:
                continue
            self._warned_metrics.add(unmet.metric)
            logger.warning(
                "%r keeps nothing: no generation in %s was saved with a metric %r (metrics "
                "there: %s), and other generations are removed now; pass the metric to "
                "save(metrics=...)",
                unmet,
                self.root,
                unmet.metric,
                ", ".join(map(repr, metric_names(there))) or "none",
            )

    def _read(self, number: int) -> None:
        path = self.root / generation_name(number)
        try:
            size = (path / MANIFEST).stat().st_size
            self.add(read_manifest(path), path, size)
        except (CheckpointError, OSError) as error:
            if not is_gone(path):
                logger.warning("%s is left alone: %s", path, error)
