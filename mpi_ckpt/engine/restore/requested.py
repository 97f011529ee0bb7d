# SPDX-License-Identifier: Apache-2.0
"""Handles a restore from a generation that the program has asked for."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from mpi_ckpt.comm import on_root
from mpi_ckpt.errors import CorruptGenerationError, ReadError, RestoreError
from mpi_ckpt.storage.directory.finding import describe_others

if TYPE_CHECKING:
    from mpi_ckpt.engine.outline import Outline
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session

logger = logging.getLogger(__name__)


def explain_choice(
    session: Session, found: OpenGeneration, problem: CorruptGenerationError
) -> CorruptGenerationError:
    """Return the error for a requested generation that turned out bad.

    Collective. Main thread only. It is not quarantined: the user who asked for it may want
    to recover data from it.
    """
    number = found.outline.generation
    others = on_root(
        session.comm,
        "listing generations",
        lambda: describe_others(session.directory.catalog, number),
        error=RestoreError,
    )
    return CorruptGenerationError(
        f"{problem}. Generation {number} was requested, so no other is used instead; "
        f"{others}",
        path=problem.path,
        generation=number,
        failures=problem.failures,
    )


def go_on_from(session: Session, chosen: Outline | None) -> None:
    """Make the next save build on the restored generation.

    Not collective. Works on root only.

    Args:
        session: The manager's.
        chosen: The requested generation; None if the newest was taken.
    """
    if not session.comm.is_root:
        return
    directory = session.directory
    base = None if chosen is None else chosen.generation
    if directory.base != base:
        directory.base = base
        directory.forget_newest()
    if chosen is not None:
        logger.info(
            "restored generation %d, step %d, as requested%s",
            chosen.generation,
            chosen.step,
            _newer(session, chosen.generation),
        )


def _newer(session: Session, chosen: int) -> str:
    root = session.directory.root
    newer: list[int] = []
    with suppress(ReadError):  # the restore has succeeded
        there = sorted(session.directory.catalog.look().generations)
        newer = [number for number in there if number > chosen]
    if not newer:
        return ""
    return (
        f"; newer generations stay: {', '.join(map(str, newer))}. The next save gets a "
        "higher number and is the newest from then on; until then, a restore without a "
        f"request takes generation {newer[-1]}. To set the newer generations aside, end "
        f"this job, then: mpi-ckpt rollback {root} {chosen}"
    )
