# SPDX-License-Identifier: Apache-2.0
"""Lets all leaders plan the same local generation, and sends what only root has."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import agree, exchange_messages, meet
from mpi_ckpt.engine.hosts.host_tiles import HostTiles
from mpi_ckpt.engine.hosts.share_plan import encode_bound, plan_shares
from mpi_ckpt.engine.hosts.tile_copies import TileCopies
from mpi_ckpt.engine.sync.captured import CapturedState, capture_states
from mpi_ckpt.errors import SaveError
from mpi_ckpt.leaves.digest import DIGEST_BYTES, digest_bytes
from mpi_ckpt.state import LeafState
from mpi_ckpt.states.unshared.ranked import RankedState
from mpi_ckpt.storage.format.manifest import LocalSet, Manifest, StoredState
from mpi_ckpt.storage.format.manifest_codec import decode, encode
from mpi_ckpt.storage.local.lineage import Origin

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mpi_ckpt.engine.hosts.host_tiles import DescribedTiles
    from mpi_ckpt.engine.hosts.level import HostLevel, HostNames
    from mpi_ckpt.engine.hosts.share_plan import BoundFiles, SharePlan
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.state import State

_PLACING = "placing a local generation"
_LENGTH_BYTES = 8
_HEAD_BYTES = DIGEST_BYTES + _LENGTH_BYTES


@dataclass(frozen=True, slots=True)
class LocalContents:
    """What a local save is of.

    Attributes:
        states: Captured leaf states, and other states, in saving order.
        differed: Names of the states that the sync has made equal.
        step: The training step.
        metrics: The user's metrics.
        tiles: The tiles of this rank, and what is cut over the ranks; None if nothing is.
    """

    states: Sequence[CapturedState | State]
    differed: Collection[str]
    step: int
    metrics: Mapping[str, float]
    tiles: DescribedTiles | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A local generation that all leaders have planned.

    Attributes:
        origin: Its place in the history.
        plan: The plan, on leaders; None elsewhere.
        equal: The contents that all ranks have, on leaders.
        sent: Name -> bytes of the files of this host that only root knew.
        copies: The files of tiles that this rank makes, sends or receives; None if there
            are none.
    """

    origin: Origin
    plan: SharePlan | None
    equal: Sequence[CapturedState] = ()
    sent: dict[str, memoryview] = field(default_factory=dict)
    copies: TileCopies | None = None


def place_generation(
    session: Session, level: HostLevel, hosts: HostNames, contents: LocalContents
) -> Placed:
    """Plan a generation on every leader, and send bound files to their hosts.

    Collective. Main thread only. One small broadcast, and one message to each host that
    holds a bound file.

    Args:
        session: The manager's.
        level: The local level, which is open.
        hosts: The hosts.
        contents: What to save.

    Raises:
        CheckpointError: On every rank, if a leader cannot take its contents, root cannot
            enter the run into the lineage, or a leader plans another generation than root.
    """
    comm, planner = session.comm, _Planner(session, level, hosts, contents)
    is_leader = comm.rank in hosts.leaders
    bound: list[BoundFiles] = []
    plans: list[SharePlan] = []

    def take() -> list[CapturedState]:
        equal = _take_equal(session, contents) if is_leader else []
        if comm.is_root:
            level.require_usable()
            bound.append(_encode_bound(session, level, contents))
            level.begin_run(session)
        return equal

    def describe(equal: list[CapturedState]) -> bytes:
        part = encode(_describe(session, level, contents, bound[0], equal))
        of_hosts = planner.describe_tiles()
        plans.append(planner.plan(decode(part), of_hosts, equal))
        outline = digest_bytes(encode(plans[0].outline))
        length = len(part).to_bytes(_LENGTH_BYTES, "big")
        return b"".join([outline, length, part, of_hosts])

    met = meet(comm, _PLACING, take, error=SaveError, encode=describe)
    head, rest = met.message[:_HEAD_BYTES], met.message[_HEAD_BYTES:]
    length = int.from_bytes(head[-_LENGTH_BYTES:], "big")
    part, of_hosts = decode(rest[:length]), rest[length:]

    def plan() -> None:
        if not is_leader or comm.is_root:
            return
        plans.append(planner.plan(part, of_hosts, met.result))
        if digest_bytes(encode(plans[0].outline)) != head[:DIGEST_BYTES]:
            raise SaveError(
                f"{comm.name} has other leaves than root, or sees the hosts in other "
                "failure domains: no local generation can be made of that"
            )

    assert part.local is not None
    level.number, level.run = part.generation, part.local.run
    agree(comm, _PLACING, plan, error=SaveError)
    mine, tiles = plans[0] if plans else None, contents.tiles
    return Placed(
        Origin(part.local.run, part.local.base, part.generation),
        mine,
        met.result,
        {} if mine is None else _send_bound(session, hosts, mine, bound),
        None if tiles is None else TileCopies(comm, hosts, tiles, mine),
    )


@dataclass(frozen=True, slots=True)
class _Planner:
    """Makes the plan of a generation from what root has sent, alike on every leader."""

    session: Session
    level: HostLevel
    hosts: HostNames
    contents: LocalContents

    def describe_tiles(self) -> bytes:
        """Return what the other leaders must know of the files of tiles. On root."""
        tiles = self.contents.tiles
        return b"" if tiles is None else json.dumps(tiles.of_hosts).encode()

    def plan(
        self, part: Manifest, of_hosts: bytes, equal: Sequence[CapturedState]
    ) -> SharePlan:
        described, files = self.contents.tiles, HostTiles()
        if described is not None:
            leaders, number = self.hosts.leaders, part.generation
            values = json.loads(of_hosts)
            files = HostTiles.join(values, described.leaves, leaders, number)
        names = [one.name for one in self.contents.states]
        copies = self.level.local.wanted_copies
        return plan_shares(part, files, names, equal, self.hosts, copies)


def is_bound(content: CapturedState | State) -> bool:
    """Return whether only root knows the contents of a state. Not collective."""
    if isinstance(content, CapturedState):
        return isinstance(content.state, RankedState) and not content.cut
    return isinstance(content, RankedState) or not isinstance(content, LeafState)


def _take_equal(session: Session, contents: LocalContents) -> list[CapturedState]:
    """Return what all ranks have. On leaders."""
    taken: list[CapturedState] = []
    for one in contents.states:
        if not isinstance(one, CapturedState) or is_bound(one):
            continue
        if one.name in contents.differed and not session.comm.is_root:
            # The sync has stored root's bytes after it had captured.
            taken += capture_states([one.state])
        else:
            taken.append(one)
    return taken


def _encode_bound(
    session: Session, level: HostLevel, contents: LocalContents
) -> BoundFiles:
    threads = session.options.io.digest_threads
    theirs = [one for one in contents.states if is_bound(one)]
    return encode_bound(theirs, level.number + 1, threads)


def _describe(
    session: Session,
    level: HostLevel,
    contents: LocalContents,
    bound: BoundFiles,
    equal: Sequence[CapturedState],
) -> Manifest:
    """Return what the other leaders cannot know, as a manifest. On root."""
    # Of states that differed, the leaders' own structures may be older; those of parts name
    # what a rank has imported.
    stubs = [
        StoredState(one.name, one.structure)
        for one in equal
        if one.name in contents.differed or isinstance(one.state, RankedState)
    ]
    return Manifest(
        generation=level.number + 1,
        step=contents.step,
        time=time.time(),
        job=session.directory.job,
        size=session.comm.size,
        metrics={name: float(value) for name, value in contents.metrics.items()},
        files=bound.files,
        states=(*bound.states, *stubs),
        local=LocalSet(
            run=level.run,
            base=session.directory.catalog.highest,
            directory=str(session.directory.root),
            hosts=(),
            domains=(),
            copies=0,
            holders=((),) * len(bound.files),
        ),
    )


def _send_bound(
    session: Session, hosts: HostNames, plan: SharePlan, bound: Sequence[BoundFiles]
) -> dict[str, memoryview]:
    """Send files that only root has to the hosts that hold them too. On leaders."""
    comm = session.comm
    host = hosts.leaders.index(comm.rank)
    sizes = {file.name: file.nbytes for file in plan.outline.files}
    sent: dict[str, memoryview] = {}
    sends, receives = [], []
    for name in plan.bound:
        others = plan.receivers(name)
        if bound:
            array = np.frombuffer(bound[0].data[name], np.uint8)
            sent[name] = array.data
            sends += [(hosts.leaders[other], array) for other in others]
        elif host in others:
            room = np.empty(sizes[name], np.uint8)
            sent[name] = room.data
            receives.append((comm.root, room))
    exchange_messages(comm, sends, receives, "sending what only root has")
    return sent
