# SPDX-License-Identifier: Apache-2.0
"""Restores a copy in memory, of which the ranks may hold tiles, if these are all left."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mpi_ckpt.engine.restore.cut.copied_tiles import find_held
from mpi_ckpt.engine.restore.cut.copied_trades import plan_copied_trades
from mpi_ckpt.engine.restore.cut.trade_plan import plan_trades
from mpi_ckpt.engine.restore.cut.trading import trade_leaves
from mpi_ckpt.engine.restore.from_memory import transfer_copy
from mpi_ckpt.errors import RestoreError

if TYPE_CHECKING:
    from mpi_ckpt.comm import Deferred
    from mpi_ckpt.engine.restore.cut.copied_tiles import HeldTiles
    from mpi_ckpt.engine.restore.cut.trade_plan import Trades
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import Progress

logger = logging.getLogger(__name__)


def find_tiles(
    session: Session, found: OpenGeneration | None
) -> tuple[HeldTiles | None, str]:
    """Find whether the ranks hold all tiles of a copy; if not, forget it, root warns.

    Collective. Main thread only.

    Args:
        session: The manager's.
        found: The source of a restore; any other than a copy with tiles is whole.

    Returns:
        What the ranks hold, on root; and on every rank what is lost, empty for nothing.
    """
    if found is None or not found.outline.copy or session.memory is None:
        return None, ""
    held, lost = find_held(session, found)
    if lost:
        session.memory.clear()
        if session.comm.is_root:
            logger.warning(
                "the copy in memory of step %d is not used, since all ranks that held some "
                "of its tiles are gone; now the newest generation is looked for:\n  %s",
                found.outline.step,
                lost,
            )
    return held, lost


def refuse_fresh_start(lost: str) -> None:
    """Refuse to take a lost copy for a first start. Not collective: the same everywhere.

    Args:
        lost: What the copy lacks; empty for none.

    Raises:
        RestoreError: On every rank, if anything is lost.
    """
    if lost:
        raise RestoreError(
            "all ranks that held some tiles of the copy in memory are gone, and no "
            "generation is there to go back to; nothing was changed. To start from the "
            f"beginning, call restore() once more, which returns None:\n  {lost}"
        )


def plan_arrivals(
    session: Session, found: OpenGeneration, match: StateMatch, held: HeldTiles | None
) -> Trades:
    """Find out what this rank reads, sends and receives of leaves that are cut.

    Collective. Main thread only. Arguments and errors are those of `plan_trades`, or of
    `plan_copied_trades` for a copy in memory.
    """
    if found.is_copy:
        return plan_copied_trades(session, found, match, held)
    return plan_trades(session, found, match)


def bring_copy(
    session: Session,
    found: OpenGeneration,
    match: StateMatch,
    trades: Trades | None,
    deferred: Deferred,
    progress: Progress,
) -> None:
    """Put every byte of a copy into its destination.

    Collective. Main thread only.

    Args:
        session: The manager's.
        found: The copy.
        match: The destinations.
        trades: What this rank does so that tiles arrive; None if there are none.
        deferred: Keeps failures to store bytes, for the next meeting.
        progress: Counts the bytes of tiles.

    Raises:
        RestoreError: On every rank, if any rank cannot store bytes.
    """
    whole = match if trades is None else match.leaving(trades.leaves)
    transfer_copy(session, found, whole, deferred)
    if trades is not None:
        args = session, found, match, trades, deferred
        trade_leaves(*args, progress, is_overwritten=True)
