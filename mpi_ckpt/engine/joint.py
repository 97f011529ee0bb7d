# SPDX-License-Identifier: Apache-2.0
"""A save that several ranks write: each a file of its own, root publishes after all agree.

Only leaves that every rank has proven equal are shared out: those of states that are not
compared, or that had to be made equal just now, and plain states, are root's to write.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import ROOT, agree, scatter_bytes
from mpi_ckpt.engine.contents import Contents, pick_leaves
from mpi_ckpt.engine.draft import Draft
from mpi_ckpt.engine.shard import foresee_shard, write_shard
from mpi_ckpt.engine.stage import stage
from mpi_ckpt.engine.writers import choose_ranks, split_by_bytes
from mpi_ckpt.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.draft import Published, SaveRequest
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.shard import Shard
    from mpi_ckpt.engine.stage import LateCopies
    from mpi_ckpt.memory import Arena
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.partial import Partial

__all__ = ["JointSave"]

Share = dict[str, list[int]]
"""State name -> indices of the leaves that one rank writes."""


class JointSave:
    """See `mpi_ckpt.engine.saver.SaveWork`. Making one begins the generation.

    Collective. Main thread only.

    Args:
        session: The manager's; its options name the writers.
        request: What to save.
        equal: Names of the states whose contents every rank has and has proven equal.
        clock: Started when the save was asked for.

    Raises:
        SaveError: On every rank, if root cannot begin.
    """

    def __init__(
        self,
        session: Session,
        request: SaveRequest,
        equal: Collection[str],
        clock: PhaseClock,
    ) -> None:
        comm = session.comm
        self._session = session
        self._clock = clock
        self._draft = self._begin(request)
        self._shares = self._share_out(equal)
        mine = _deal(comm, self._tasks(), session.options.window_bytes)
        self._generation: int = mine["generation"]
        self._job: str = mine["job"]
        contents = request.contents if self._draft is None else self._draft.contents
        self._mine = _pick(contents, mine["share"])
        self._plain: list[State] = request.plain if comm.is_root else []
        self._staged = request.staged
        self._shard: Shard | None = None
        self.published: Published | None = None
        self.writes_here = comm.is_root or bool(self._mine)

    def stage(self, arena: Arena) -> LateCopies:
        """Copy what this rank writes, unless it is a copy. Not collective."""
        if self._staged is not None:
            return self._staged.late
        staged = stage(arena, [*self._mine, *self._plain])
        self._mine = [one for one in staged.states if isinstance(one, Contents)]
        self._plain = [one for one in staged.states if not isinstance(one, Contents)]
        return staged.late

    @without_collections
    def write(self) -> None:
        """Write this rank's share. Not collective. On any thread.

        Raises:
            SaveError: On the calling rank.
        """
        with self._clock.phase("write"):
            partial = self._partial()
            if self._draft is not None:
                self._draft.write_streams(self._plain)
            self._shard = write_shard(partial, self._mine, self._session.comm.rank)

    def conclude(self, written: Callable[[], None]) -> Published | None:
        """Agree that every share is durable; root publishes.

        Collective.

        Raises:
            SaveError: On every rank; nothing was published.
        """
        try:
            agree(self._session.comm, "writing a share of a save", written, error=SaveError)
            self.published = self._session.on_root("publishing", self._publish, SaveError)
        except BaseException:
            self.abandon()
            raise
        return self.published

    def abandon(self) -> None:
        """Leave nothing behind. Not collective. No rank writes any more."""
        if self._draft is not None:
            self._draft.drop()

    def _begin(self, request: SaveRequest) -> Draft | None:
        session = self._session

        def begin() -> Draft:
            with self._clock.phase("write"):
                return Draft(session.directory, request, session.options)

        return session.on_root("beginning a generation", begin, SaveError)

    def _share_out(self, equal: Collection[str]) -> dict[int, Share]:
        """Tell, on root alone, what each writer writes."""
        if self._draft is None:
            return {}
        session = self._session
        writers = choose_ranks(session.options.writers, session.comm.topology)
        return share_out(self._draft.contents, self._draft.fresh, equal, writers)

    def _tasks(self) -> list[dict[str, Any]]:
        """Return, on root alone, what each rank must know, in rank order."""
        if self._draft is None:
            return []
        known = {
            "generation": self._draft.partial.generation,
            "job": self._session.directory.job,
        }
        ranks = range(self._session.comm.size)
        return [{**known, "share": self._shares.get(rank, {})} for rank in ranks]

    def _partial(self) -> Partial:
        if self._draft is not None:
            return self._draft.partial
        return self._session.directory.join(self._generation, self._job)

    @without_collections
    def _publish(self) -> Published:
        assert self._draft is not None  # this is root
        contents = self._draft.contents
        others = [
            foresee_shard(_pick(contents, share), rank, self._generation)
            for rank, share in self._shares.items()
            if rank != ROOT
        ]
        shards = [one for one in (self._shard, *others) if one is not None]
        return self._draft.publish(shards, self._clock)


def _deal(
    comm: Communicator, tasks: Sequence[dict[str, Any]], window_bytes: int
) -> dict[str, Any]:
    """Give each rank its own task, which root knows."""
    encoded = [json.dumps(one).encode() for one in tasks]
    mine = scatter_bytes(
        comm,
        [len(one) for one in encoded],
        (([rank], one) for rank, one in enumerate(encoded)),
        "sharing out a save",
        error=SaveError,
        window_bytes=window_bytes,
    )
    task: dict[str, Any] = json.loads(mine)
    return task


def share_out(
    contents: Sequence[Contents],
    fresh: Sequence[Sequence[int]],
    equal: Collection[str],
    writers: Sequence[int],
) -> dict[int, Share]:
    """Tell which leaves each writer writes.

    Not collective. Thread-safe. Pure.

    Args:
        contents: What is saved.
        fresh: Indices of the leaves of each that are not shared with older generations.
        equal: Names of the contents that any writer may write.
        writers: Their ranks, root first.
    """
    free: list[tuple[tuple[str, int], int]] = []
    bound: list[tuple[str, int]] = []
    for one, numbers in zip(contents, fresh, strict=True):
        for number in numbers:
            if one.name in equal:
                free.append(((one.name, number), one.leaves[number].spec.nbytes))
            else:
                bound.append((one.name, number))
    split = split_by_bytes(free, len(writers))
    split[0] = [*bound, *split[0]]
    shares: dict[int, Share] = {rank: {} for rank in writers}
    for rank, keys in zip(writers, split, strict=True):
        for name, number in keys:
            shares[rank].setdefault(name, []).append(number)
    return shares


def _pick(
    contents: Sequence[Contents], share: Mapping[str, Sequence[int]]
) -> list[Contents]:
    return [pick_leaves(one, share[one.name]) for one in contents if one.name in share]
