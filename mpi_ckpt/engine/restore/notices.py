# SPDX-License-Identifier: Apache-2.0
"""Reports a restore, and logs on root what differs, and what follows from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.failures import concerning
from mpi_ckpt.reports import RestoreReport
from mpi_ckpt.state import LeafState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpi_ckpt.engine.outline import Outline
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.state import Change

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResizeWatch:
    """What states report of a change of the number of ranks, observed before the restore.

    Attributes:
        observed: For each state the function that describes its change.
    """

    observed: Sequence[Callable[[], Change]] = ()

    @classmethod
    def begin(cls, outline: Outline, matched: StateMatch, size: int) -> ResizeWatch:
        """Look at states before they are restored. Root only.

        Args:
            outline: Outline of the generation.
            matched: Its states and the program's.
            size: Number of ranks now.
        """
        if outline.size == size:
            return cls()
        observed = []
        for pair in matched.states:
            if isinstance(pair.state, LeafState):
                with concerning(f"state {pair.state.name!r}"):
                    watch = pair.state.observe_resize(
                        pair.saved.structure, outline.size, size
                    )
                observed.append(watch)
        return cls(observed)

    def log(self, report: RestoreReport) -> None:
        """Log in one line what has changed, if this is root. Not collective."""
        changes = [change for watch in self.observed if (change := watch()).text]
        if not self.observed:
            return
        unusual = any(change.is_unusual for change in changes)
        logger.log(
            logging.WARNING if unusual else logging.INFO,
            "restored on %d rank%s a generation that %d saved%s",
            report.size,
            "s" * (report.size != 1),
            report.saved_size,
            "".join(f"; {change.text}" for change in changes),
        )


def make_report(
    session: Session,
    found: OpenGeneration,
    match: StateMatch,
    seconds: Mapping[str, float],
    bytes_traded: int,
) -> RestoreReport:
    """Make the report of a restore, the same on every rank but for the seconds.

    Collective. Main thread only.

    Args:
        session: The manager's.
        found: What was restored.
        match: Its states and the program's.
        seconds: Phase -> seconds.
        bytes_traded: Bytes of tiles that this rank has read.
    """
    outline = found.outline
    return RestoreReport(
        generation=outline.generation,
        path=Path(outline.path) if outline.path else session.directory.root,
        step=outline.step,
        saved_size=outline.size,
        size=session.comm.size,
        bytes_read=0 if found.is_copy else _count_bytes(session, found, bytes_traded),
        seconds=seconds,
        metrics=outline.metrics,
        quarantined=outline.quarantined,
        missing=match.missing,
        unexpected=match.unexpected,
        missing_leaves=match.missing_leaves,
        unexpected_leaves=match.unexpected_leaves,
        from_memory=found.is_copy,
        level=found.level,
    )


def _count_bytes(session: Session, found: OpenGeneration, bytes_traded: int) -> int:
    mine = np.array([0 if found.reader is None else found.reader.bytes_read])
    counted = session.comm.all_reduce(mine + bytes_traded, "sum", "counting what was read")
    return int(counted[0])


def warn_of_restored(session: Session, outline: Outline, warnings: Sequence[str]) -> None:
    """Log the states' warnings after a restore. Root only, no effect elsewhere."""
    for text in warnings if session.comm.is_root else ():
        logger.warning("%s: %s", outline.title, text)


def warn_of_differences(session: Session, report: RestoreReport) -> None:
    """Log what only one side has. Root only, no effect elsewhere."""
    differences = {
        "only the program has": [*report.missing, *_paths(report.missing_leaves)],
        "only the generation has": [*report.unexpected, *_paths(report.unexpected_leaves)],
    }
    for side, names in differences.items():
        if names and session.comm.is_root:
            logger.warning("generation %d: %s %s", report.generation, side, names)


def _paths(leaves: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [f"{state}/{leaf}" for state, names in leaves.items() for leaf in names]
