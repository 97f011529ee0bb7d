# SPDX-License-Identifier: Apache-2.0
"""Restores a copy in memory, of which the ranks may hold tiles, if these are all left."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING

from mpi_ckpt.comm import gather_bytes, meet, scatter_bytes
from mpi_ckpt.decomposition.reshard import plan_reshard
from mpi_ckpt.engine.restore.cut.copied_tiles import HeldTiles, find_held
from mpi_ckpt.engine.restore.cut.trade_plan import (
    Trade,
    Trades,
    joined,
    plan_trades,
    refuse_unwanted,
)
from mpi_ckpt.engine.restore.cut.trading import trade_leaves
from mpi_ckpt.engine.restore.cut.wanted import LeafIndex, encode_wants, join_wants
from mpi_ckpt.engine.restore.from_memory import transfer_copy
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.leaves.digest import BLOCK_BYTES
from mpi_ckpt.options import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.comm import Deferred
    from mpi_ckpt.engine.restore.cut.wanted import Wants
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import Progress

logger = logging.getLogger(__name__)


_PLANNING = "planning how copied tiles reach the ranks"


def plan_copied_trades(
    session: Session, found: OpenGeneration, match: StateMatch, held: HeldTiles | None
) -> Trades:
    """Find out what this rank sends and receives of the tiles of a copy.

    Collective. Main thread only. Nothing is changed.

    Args:
        session: The manager's.
        found: The copy.
        match: The states to restore, with this rank's destinations.
        held: What the ranks hold, on root; of a copy without tiles None.

    Raises:
        StateMismatchError: On every rank, if no rank wants a leaf and options are strict.
    """
    comm, options = session.comm, session.options
    gathered = gather_bytes(comm, encode_wants(match), _PLANNING)
    parts: list[bytes] = []

    def plan() -> bytes:
        if not comm.is_root:
            return b""
        tiles = held or HeldTiles({}, {})
        states = [matched.saved for matched in match.states]
        wants = join_wants(states, gathered, partial(tiles.stored, states))
        if options.strict:
            refuse_unwanted(found, wants)
        parts.extend(_plan_of_ranks(session, wants, tiles.holders))
        return json.dumps([sorted(wants.leaves), wants.unwanted]).encode()

    met = meet(comm, _PLANNING, plan, error=RestoreError, encode=bytes)
    leaves, unwanted = json.loads(met.message)
    window = options.io.window_bytes
    mine = scatter_bytes(comm, parts, _PLANNING, window_bytes=window)
    return Trades(
        leaves=frozenset(LeafIndex(*leaf) for leaf in leaves),
        unwanted={state: tuple(names) for state, names in unwanted.items()},
        of_leaves=Trade.decode(mine),
        with_parts=(),
        part_forms={},
        of_parts=None,
    )


def _plan_of_ranks(
    session: Session, wants: Wants, holders: Mapping[str, Sequence[int]]
) -> list[bytes]:
    plan = plan_reshard(
        wants.saved,
        wants.wanted,
        itemsizes=wants.itemsizes,
        digest_bytes=BLOCK_BYTES,
        readers=range(session.comm.size),
        window_bytes=session.options.io.window_bytes,
        # What was whole is root's.
        holders=[holders.get(name, (ROOT,)) for name in wants.files],
    )
    parts = []
    for rank in range(session.comm.size):
        mine = plan.of_rank(rank)
        files = {number: wants.files[number] for number in set(mine.reads.file.tolist())}
        parts.append(joined(json.dumps(files).encode(), b"", mine.encode()))
    return parts


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
