# SPDX-License-Identifier: Apache-2.0
"""Describes the files of tiles of all hosts, so that every leader knows them.

The ranks of a host digest their tiles, and its leader makes the header of their file before
any byte is moved. The list of cut leaves, which grows with the ranks, is sent again only
when any rank's tiles have changed their forms.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm import agree, bcast_json, exchange_messages, gather_bytes
from mpi_ckpt.engine.hosts.handed_tiles import (
    SteadyTiles,
    count_digests,
    decode_digests,
    digest_tiles,
    encode_digests,
)
from mpi_ckpt.engine.save.cut.cut_forms import as_leaf_spec
from mpi_ckpt.engine.save.cut.survey import survey_tiles, take_tiles
from mpi_ckpt.errors import SaveError, StageError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.storage.format.layout import tile_file_name
from mpi_ckpt.storage.format.manifest import CutLeaf, StoredFile
from mpi_ckpt.storage.format.tile_table import file_order, plan_tile_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.hosts.handed_tiles import DigestedTile
    from mpi_ckpt.engine.save.cut.own_tiles import CapturedTiles
    from mpi_ckpt.engine.save.cut.survey import TileSurvey
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.leaves.digest import Digest
    from mpi_ckpt.storage.format.tile_table import TileEntry

_DOING = "describing the tiles of a host"
_ADVICE = (
    "A host keeps the tiles of all its ranks in one file: join small arrays into larger "
    "ones, use more hosts, or save to the directory, where each rank has a file of its own"
)


@dataclass(frozen=True, slots=True)
class HostSurvey:
    """How cut leaves lie on the ranks, for saves to their hosts.

    Attributes:
        ranks: The survey of the ranks; those of a host hand their tiles to its leader.
        leaves: State -> its cut leaves; the same on every rank.
    """

    ranks: TileSurvey
    leaves: Mapping[str, tuple[CutLeaf, ...]]


@dataclass(frozen=True, slots=True)
class HostTiles:
    """The files of tiles of a generation, one of each host that has any.

    Attributes:
        files: Their entries in the manifest.
        hosts: For each of them the index of the host whose ranks have the tiles.
        names: State -> names of the files with tiles of it.
        leaves: State -> its cut leaves.
    """

    files: tuple[StoredFile, ...] = ()
    hosts: tuple[int, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    leaves: Mapping[str, tuple[CutLeaf, ...]] = field(default_factory=dict)

    @classmethod
    def join(
        cls,
        of_hosts: Sequence[Any],
        leaves: Mapping[str, tuple[CutLeaf, ...]],
        leaders: Sequence[int],
        generation: int,
    ) -> HostTiles:
        """Join the files of hosts. Not collective. Thread-safe.

        Args:
            of_hosts: What `OwnFile.to_json` returned on leaders, and None for hosts without
                tiles.
            leaves: State -> its cut leaves.
            leaders: The ranks of the leaders.
            generation: Number of the generation.
        """
        files, hosts = [], []
        names: dict[str, list[str]] = {}
        for host, values in enumerate(of_hosts):
            if values is None:
                continue
            nbytes, header_bytes, digest, states = values
            name = tile_file_name(leaders[host])
            files.append(
                StoredFile(name, nbytes, header_bytes, bytes.fromhex(digest), generation)
            )
            hosts.append(host)
            for state in states:
                names.setdefault(state, []).append(name)
        by_state = {state: tuple(of_state) for state, of_state in names.items()}
        return cls(tuple(files), tuple(hosts), by_state, leaves)


@dataclass(frozen=True, slots=True)
class OwnFile:
    """The file of tiles that a leader makes of those of its host's ranks.

    Attributes:
        header: Its header.
        nbytes: Its length in bytes.
        tiles: The rank that hands over each tile, and the tile's length in bytes, in file
            order.
        states: Names of the states with tiles in it.
    """

    header: bytes
    nbytes: int
    tiles: tuple[tuple[int, int], ...]
    states: tuple[str, ...]

    def to_json(self) -> list[Any]:
        """Return what other leaders must know. Not collective. Thread-safe."""
        digest = digest_bytes(self.header).hex()
        return [self.nbytes, len(self.header), digest, self.states]


@dataclass(frozen=True, slots=True)
class DescribedTiles:
    """The tiles of a local save, before any of their bytes has moved.

    Attributes:
        captured: The tiles that this rank gives.
        own: Their bytes.
        file: The file of this host, on its leader; None elsewhere, or if it has no tiles.
        of_hosts: What `HostTiles.join` takes, on root.
        leaves: State -> its cut leaves.
    """

    captured: Sequence[CapturedTiles]
    own: SteadyTiles
    file: OwnFile | None
    of_hosts: Sequence[Any]
    leaves: Mapping[str, tuple[CutLeaf, ...]]


def survey_hosts(
    session: Session, captured: Sequence[CapturedState], previous: HostSurvey | None
) -> HostSurvey:
    """Find which tiles each rank gives to the leader of its host.

    Collective. Main thread only. One allreduce of 56 bytes, if nothing has changed since
    the previous survey.

    Args:
        session: The manager's.
        captured: The contents of this rank.
        previous: The previous survey; None for none.

    Raises:
        StageError: On every rank, if the tiles of all ranks do not make whole leaves.
    """
    comm = session.comm
    leaders = [comm.topology.leaders[node] for node in comm.topology.node_of]
    before = None if previous is None else previous.ranks
    ranks = survey_tiles(comm, captured, before, session.options, leaders)
    if previous is not None and ranks is before:
        return previous
    joined = {} if ranks.joined is None else ranks.joined.leaves
    values = [
        [state, [[leaf.spec.to_json(), leaf.tiles] for leaf in leaves]]
        for state, leaves in joined.items()
    ]
    leaves = {
        state: tuple([CutLeaf(as_leaf_spec(*spec), tiles) for spec, tiles in of_state])
        for state, of_state in bcast_json(comm, values, _DOING)
    }
    return HostSurvey(ranks, leaves)


def describe_tiles(
    comm: Communicator, captured: Sequence[CapturedState], survey: HostSurvey
) -> DescribedTiles:
    """Digest the tiles of all ranks, and let each leader lay out the file of its host.

    Collective. Main thread only. A rank sends its leader 16 bytes for a tile of one block;
    root gets some 100 bytes of each host.

    Args:
        comm: The communicator.
        captured: The contents of this rank.
        survey: Their survey.

    Raises:
        DivergedError: On every rank, if two ranks have different bytes for one tile.
        StageError: On every rank, if any rank cannot read a tile.
        SaveError: On every rank, if a file would have too many tiles.
    """
    taken: Sequence[CapturedTiles] = take_tiles(comm, captured, survey.ranks)
    mine = agree(comm, _DOING, lambda: digest_tiles(taken), error=StageError)
    entries, digests = _gather_digests(comm, mine, survey)

    def lay_out() -> OwnFile | None:
        return _lay_out(entries, digests) if any(entries.values()) else None

    file = agree(comm, _DOING, lay_out, error=SaveError)
    text = json.dumps(None if file is None else file.to_json()).encode()
    is_leader = comm.rank in comm.topology.leaders
    gathered = gather_bytes(comm, text if is_leader else b"", _DOING)
    of_hosts = [json.loads(one) for one in gathered if one]
    return DescribedTiles(taken, SteadyTiles(mine), file, of_hosts, survey.leaves)


def _gather_digests(
    comm: Communicator, mine: Sequence[DigestedTile], survey: HostSurvey
) -> tuple[dict[int, list[TileEntry]], list[Digest]]:
    """Return on a leader the tiles of its host's ranks, and their digests in that order."""
    ranks = survey.ranks.mine
    text = np.frombuffer(encode_digests(mine), np.uint8)
    if ranks.writer != comm.rank:
        exchange_messages(comm, [(ranks.writer, text)], [], _DOING)
        return {}, []
    entries = {comm.rank: [tile.entry for tile in mine]}
    for rank, carried in ranks.carried.items():
        entries[rank] = [carried[number] for number in file_order(carried)]
    rooms = {
        rank: np.empty(count_digests(of_rank), np.uint8)
        for rank, of_rank in entries.items()
        if rank != comm.rank
    }
    exchange_messages(comm, [], list(rooms.items()), _DOING)
    digests = [tile.digest for tile in mine]
    for rank, room in rooms.items():
        digests += decode_digests(entries[rank], room.data)
    return entries, digests


def _lay_out(
    of_ranks: Mapping[int, Sequence[TileEntry]], digests: Sequence[Digest]
) -> OwnFile:
    ranks = [rank for rank, entries in of_ranks.items() for _ in entries]
    entries = [entry for of_rank in of_ranks.values() for entry in of_rank]
    plan = plan_tile_file(entries, advice=_ADVICE)
    return OwnFile(
        plan.encode([digests[number] for number in plan.order]),
        plan.nbytes,
        tuple([(ranks[number], entries[number].nbytes) for number in plan.order]),
        tuple(dict.fromkeys(entry.state for entry in entries)),
    )
