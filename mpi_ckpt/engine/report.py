# SPDX-License-Identifier: Apache-2.0
"""Reports that every rank returns: root knows, the others are told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.comm import bcast_json
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.reports import (
    GenerationInfo,
    PhaseClock,
    RestoreReport,
    SaveReport,
    SyncReport,
)
from mpi_ckpt.storage.layout import generation_name

if TYPE_CHECKING:
    from mpi_ckpt.engine.draft import Published
    from mpi_ckpt.engine.find import Fit, Found
    from mpi_ckpt.engine.session import Session

__all__ = ["list_generations", "report_restore", "report_save"]


def list_generations(session: Session) -> list[GenerationInfo]:
    """Tell all ranks what root finds, oldest first. Collective. Nothing is pending.

    Raises:
        CheckpointError: On every rank, if root cannot list the directory.
    """
    doing, catalog = "listing generations", session.directory.catalog
    found = session.on_root(doing, catalog.generations, RestoreError)
    mine = [one.to_json() for one in found or []]
    told = bcast_json(session.comm, mine, doing)
    return [GenerationInfo(**{**one, "path": Path(one["path"])}) for one in told]


def report_save(
    session: Session,
    published: Published | None,
    *,
    step: int,
    synced: SyncReport,
    clock: PhaseClock,
) -> SaveReport:
    """Make the report of a save. Collective. Main thread only.

    Args:
        session: The session.
        published: What root did; None elsewhere.
        step: The training step noted.
        synced: What the sync did.
        clock: This rank's; root's phases are told to all.
    """
    mine = published and {
        "generation": published.generation,
        "path": str(published.path),
        "bytes_written": published.bytes_written,
        "bytes_reused": published.bytes_reused,
        "pruned": published.retired,
        "seconds": clock.seconds(),
    }
    told = bcast_json(session.comm, mine, "acknowledging a save")
    return SaveReport(
        generation=told["generation"],
        path=Path(told["path"]),
        step=step,
        size=session.comm.size,
        bytes_written=told["bytes_written"],
        bytes_reused=told["bytes_reused"],
        seconds={**told["seconds"], **clock.seconds()},
        pruned=tuple(told["pruned"]),
        sync=synced,
    )


def report_restore(
    session: Session, found: Found, fit: Fit, bytes_read: int, clock: PhaseClock
) -> RestoreReport:
    """Make the report of a restore. Collective. Main thread only.

    Args:
        session: The session.
        found: The generation that was restored.
        fit: The states that were.
        bytes_read: By all ranks that read.
        clock: This rank's.
    """
    mine = found.reader and {
        "path": str(session.directory.root / generation_name(found.generation)),
        "quarantined": session.directory.set_aside,
    }
    told = bcast_json(session.comm, mine, "reporting a restore")
    session.note("restored", found.description["step"])
    return RestoreReport(
        generation=found.generation,
        path=Path(told["path"]),
        step=found.description["step"],
        saved_size=found.description["size"],
        size=session.comm.size,
        bytes_read=bytes_read,
        seconds=clock.seconds(),
        metrics={name: float(v) for name, v in found.description["metrics"].items()},
        quarantined=told["quarantined"],
        missing=fit.missing,
        unexpected=fit.unexpected,
        missing_leaves=fit.missing_leaves,
        unexpected_leaves=fit.unexpected_leaves,
    )
