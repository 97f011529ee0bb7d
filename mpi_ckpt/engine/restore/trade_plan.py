# SPDX-License-Identifier: Apache-2.0
"""Plans how leaves that are cut over ranks, in the files or in the program, arrive.

Root plans which rank reads which run of a file, and to whom its parts go, and sends each
rank its own part of the plan: what other ranks hold grows with their neighbours only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import choose_ranks, gather_bytes, meet, scatter_parts
from mpi_ckpt.decomposition.rank_plan import RankPlan
from mpi_ckpt.decomposition.reshard import plan_reshard
from mpi_ckpt.digest import DIGEST_BYTES
from mpi_ckpt.engine.restore.wanted import LeafIndex, encode_wants, join_wants
from mpi_ckpt.errors import RestoreError, StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.engine.restore.matching import StateMatch
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.restore.wanted import Wants
    from mpi_ckpt.engine.session import Session

_PLANNING = "planning how tiles reach the ranks"


@dataclass(frozen=True, slots=True)
class Trade:
    """What this rank does so that cut leaves arrive.

    Attributes:
        leaves: The leaves that arrive so; the same on every rank.
        unwanted: State -> names of its cut leaves that no rank wants; the same on every
            rank.
        plan: What this rank reads, sends and receives.
        files: Names of the files that this rank reads, by the plan's numbers.
        digests: The digest of each piece that this rank reads.
    """

    leaves: frozenset[LeafIndex]
    unwanted: Mapping[str, tuple[str, ...]]
    plan: RankPlan
    files: Mapping[int, str]
    digests: Sequence[bytes]


def plan_trade(session: Session, found: OpenGeneration, match: StateMatch) -> Trade:
    """Find out what this rank reads, sends and receives.

    Collective. Main thread only. Nothing is changed.

    Args:
        session: The manager's.
        found: The generation, open on root.
        match: The states to restore, with this rank's destinations.

    Raises:
        StateMismatchError: On every rank, if no rank wants a cut leaf and options are
            strict.
        CorruptGenerationError: On every rank, if a list of tiles is damaged.
        ReadError: On every rank, if root cannot read one.
    """
    comm, options = session.comm, session.options
    gathered = gather_bytes(comm, encode_wants(match), _PLANNING)
    parts: list[bytes] = []

    def plan() -> bytes:
        if found.kept is not None:
            raise RestoreError(
                "the program has state that is cut over the ranks, and the newest "
                "generation is on the hosts, which keep whole state only: restore it with "
                "state that is not cut, save that to the directory, and go on from there"
            )
        if found.reader is None or not comm.is_root:
            return b""
        states = [matched.saved for matched in match.states]
        wants = join_wants(found.reader, states, gathered)
        if options.strict:
            _refuse_unwanted(found, wants)
        parts.extend(_plan_of_ranks(session, found, wants))
        return json.dumps([sorted(wants.leaves), wants.unwanted]).encode()

    met = meet(comm, _PLANNING, plan, error=RestoreError, encode=bytes)
    leaves, unwanted = json.loads(met.message)
    mine = scatter_parts(
        comm,
        parts,
        _PLANNING,
        error=RestoreError,
        window_bytes=options.io.window_bytes,
    )
    head, digests, encoded = _split(mine)
    return Trade(
        leaves=frozenset(LeafIndex(*leaf) for leaf in leaves),
        unwanted={state: tuple(names) for state, names in unwanted.items()},
        plan=RankPlan.decode(encoded),
        files={int(number): name for number, name in json.loads(head).items()},
        digests=[
            digests[start : start + DIGEST_BYTES]
            for start in range(0, len(digests), DIGEST_BYTES)
        ],
    )


def _refuse_unwanted(found: OpenGeneration, wants: Wants) -> None:
    cut = {
        state.name: {leaf.name: leaf for leaf in state.cut}
        for state in found.outline.states
    }
    problems = [
        f"{state}: {cut[state][name]} is saved, the program has no such leaf on any rank"
        for state, names in wants.unwanted.items()
        for name in names
    ]
    if problems:
        raise StateMismatchError(
            f"{found.outline.title} does not fit the program, nothing was changed:\n  "
            + "\n  ".join(problems),
            generation=found.outline.generation,
            problems=problems,
        )


def _plan_of_ranks(session: Session, found: OpenGeneration, wants: Wants) -> list[bytes]:
    """Return for each rank its files, the digests of what it reads, and its plan."""
    comm, io = session.comm, session.options.io
    plan = plan_reshard(
        wants.saved,
        wants.wanted,
        itemsizes=wants.itemsizes,
        digest_bytes=found.outline.block_bytes,
        readers=readers_of_tiles(session),
        window_bytes=io.window_bytes,
    )
    parts = []
    for rank in range(comm.size):
        mine = plan.of_rank(rank)
        files = {number: wants.files[number] for number in set(mine.reads.file.tolist())}
        digests = [
            wants.stored[tile].leaf.digest.blocks[number]
            for tile, number in zip(
                mine.pieces.tile.tolist(), mine.pieces.number.tolist(), strict=True
            )
        ]
        parts.append(_joined(json.dumps(files).encode(), b"".join(digests), mine.encode()))
    return parts


def readers_of_tiles(session: Session) -> list[int]:
    """Return the ranks that read tiles. Not collective.

    All ranks read, unless the options name one a host: on as many ranks as saved, each then
    reads its own file.
    """
    readers = session.options.io.readers
    ranks = choose_ranks("all" if readers == "root" else readers, session.comm.topology)
    return list(ranks)


def _joined(*parts: bytes) -> bytes:
    lengths = np.array([len(part) for part in parts], np.int64)
    return b"".join([lengths.tobytes(), *parts])


def _split(data: bytes) -> tuple[bytes, bytes, bytes]:
    first, second, third = np.cumsum(np.frombuffer(data[:24], np.int64)).tolist()
    return (
        data[24 : 24 + first],
        data[24 + first : 24 + second],
        data[24 + second : 24 + third],
    )
