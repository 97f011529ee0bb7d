# SPDX-License-Identifier: Apache-2.0
"""Joins the history of a directory with its manifests; adds up where time went. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mpi_ckpt.storage.journal import HistoryEvent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.storage.format.manifest import Manifest


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The events of a directory, in the order of their times.

    Attributes:
        events: Those in the history, and the saves that only manifests show.
    """

    events: tuple[HistoryEvent, ...]

    @classmethod
    def of(cls, events: Sequence[HistoryEvent], manifests: Sequence[Manifest]) -> RunRecord:
        """Join a history, which may be incomplete, with the generations that are left."""
        known = {event.generation for event in events if event.event == "saved"}
        others = [
            HistoryEvent(
                event="saved",
                time=manifest.time,
                job=manifest.job,
                step=manifest.step,
                ranks=manifest.size,
                generation=manifest.generation,
                nbytes=manifest.nbytes,
                metrics=manifest.metrics,
            )
            for manifest in manifests
            if manifest.generation not in known
        ]
        return cls(tuple(sorted([*events, *others], key=lambda event: event.time)))

    @property
    def jobs(self) -> list[list[HistoryEvent]]:
        """The events of each job, in the order in which the jobs began."""
        found: dict[str, list[HistoryEvent]] = {}
        for event in self.events:
            found.setdefault(event.job, []).append(event)
        return list(found.values())

    @property
    def saves(self) -> list[HistoryEvent]:
        """The saves."""
        return [event for event in self.events if event.event == "saved"]

    @property
    def metric_names(self) -> list[str]:
        """The metrics that any save has, sorted."""
        return sorted({name for event in self.saves for name in event.metrics})

    def seconds_by_phase(self) -> dict[str, dict[str, float]]:
        """Return for each kind of save, and restores, the seconds by phase and in total.

        ``copied`` are the saves that hosts have copied behind the training.
        """
        kinds = ("saved", "kept", "copied", "restored")
        sums: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
        for event in self.events:
            found = sums.get("copied" if event.copied_from else event.event)
            if found is not None:
                _add(found, event.seconds)
        return {kind: phases for kind, phases in sums.items() if phases}

    def span_seconds(self) -> float:
        """Return the time that jobs were running, from their first to their last event."""
        return sum(job[-1].time - job[0].time for job in self.jobs)

    def lost_seconds(self) -> float:
        """Return the time between the last event of a job and the first of the next."""
        pairs = pairwise(self.jobs)
        return sum(max(0.0, new[0].time - old[-1].time) for old, new in pairs)


def _add(sums: dict[str, float], seconds: Mapping[str, float]) -> None:
    for name, spent in seconds.items():
        sums[name] = sums.get(name, 0.0) + spent
