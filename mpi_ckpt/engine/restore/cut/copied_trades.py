# SPDX-License-Identifier: Apache-2.0
"""Plans how the tiles of a copy in memory reach the ranks, from those that hold them."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from mpi_ckpt.comm import gather_bytes, meet, scatter_parts
from mpi_ckpt.decomposition.reshard import plan_reshard
from mpi_ckpt.engine.restore.cut.copied_tiles import HeldTiles
from mpi_ckpt.engine.restore.cut.trade_plan import Trade, Trades, joined, refuse_unwanted
from mpi_ckpt.engine.restore.cut.wanted import LeafIndex, encode_wants, join_wants
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.leaves.digest import BLOCK_BYTES
from mpi_ckpt.options import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.engine.restore.cut.wanted import Wants
    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session

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
    mine = scatter_parts(comm, parts, _PLANNING, error=RestoreError, window_bytes=window)
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
