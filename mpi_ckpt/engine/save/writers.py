# SPDX-License-Identifier: Apache-2.0
"""Writes a generation: by root alone, or by several ranks of which root publishes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree, gather_bytes, on_root
from mpi_ckpt.engine.save.cut.carrying import CarriedTiles, hand_over
from mpi_ckpt.engine.save.cut.own_tiles import (
    CapturedTiles,
    OwnTiles,
    TileFiles,
    TileHistory,
    runs_of,
    write_own_tiles,
)
from mpi_ckpt.engine.save.draft import Draft
from mpi_ckpt.engine.save.shard import foresee_shard, write_shard
from mpi_ckpt.engine.save.sharing import Task, deal_tasks, pick_share, share_out
from mpi_ckpt.engine.sync.captured import CapturedState
from mpi_ckpt.errors import SaveError
from mpi_ckpt.options import ROOT
from mpi_ckpt.reports import Progress
from mpi_ckpt.storage.format.layout import shard_file_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mpi_ckpt.engine.save.cut.own_tiles import WrittenTiles
    from mpi_ckpt.engine.save.cut.survey import TileSurvey
    from mpi_ckpt.engine.save.request import Published, SaveRequest
    from mpi_ckpt.engine.save.reuse import KnownLeaves
    from mpi_ckpt.engine.save.shard import ShardImage
    from mpi_ckpt.engine.save.sharing import Share
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.sync.parts import PartsInTransit
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.writing.partial import Partial


class JointWrite:
    """A generation that several ranks write.

    Root begins it, and shares out the leaves that all ranks have; a rank writes the tiles
    that it owns. Each rank writes and fsyncs its own files. Root publishes after all ranks
    have agreed that theirs are durable.

    Args:
        session: The manager's.
        request: What to save.
        survey: How leaves are cut over the ranks; None if none is.
        tiles: The tiles that this rank writes.
        history: What this rank has in the generation that was saved last.
        parts: The parts of ranks that root writes.
    """

    def __init__(
        self,
        session: Session,
        request: SaveRequest,
        survey: TileSurvey | None,
        tiles: Sequence[CapturedTiles],
        history: TileHistory,
        parts: PartsInTransit,
    ) -> None:
        self._session = session
        self._request = request
        self._survey = survey
        self._tiles = tiles
        self._history = history
        self._parts = parts
        self._own = OwnTiles({})
        self._draft: Draft | None = None
        self._shares: dict[int, Share] = {}
        self._task: Task | None = None
        self._partial: Partial | None = None
        self._progress = Progress()

    def begin(
        self, writers: Sequence[int], equal: Collection[str], clock: PhaseClock
    ) -> list[CapturedState | State]:
        """Begin the generation on root, and return what this rank is to write.

        Collective. Main thread only.

        Args:
            writers: Ranks that may write leaves which all ranks have, root first.
            equal: Names of the states whose leaves were proven equal on all ranks.
            clock: The save's.

        Raises:
            SaveError: On every rank, if root cannot begin a generation, or a rank that is
                to write does not see it; no byte was written.
        """
        session, request = self._session, self._request
        comm, options = session.comm, session.options
        self._progress = clock.progress

        tasks: list[Task] = []
        # The same on every rank. If root alone writes leaves that all ranks have, the
        # others need no share, and one broadcast tells them what remains.
        is_shared = len(writers) > 1

        def begin() -> list[object] | None:
            joined = None if self._survey is None else self._survey.joined
            # Tiles that are shared take no space, and only their ranks know of them.
            may_share = options.io.reuse and self._history.generation > 0
            nbytes = 0 if joined is None or may_share else joined.nbytes
            with clock.phase("write"):
                self._draft = draft = Draft.begin(
                    session.directory, request, options, tile_bytes=nbytes
                )
            self._shares = share_out(draft.captured, draft.fresh, equal, writers)
            number, job = draft.partial.generation, session.directory.job
            shares = [self._shares.get(rank, {}) for rank in range(comm.size)]
            tasks.extend(Task(number, job, share) for share in shares)
            return None if is_shared else [number, job]

        try:
            told = on_root(comm, "beginning a generation", begin, error=SaveError)
        except BaseException:
            self.drop()
            raise
        captured: Sequence[CapturedState] = request.captured
        if self._draft is not None:
            captured = self._draft.captured
        if is_shared:
            self._task = deal_tasks(comm, tasks, options.io.window_bytes)
        else:
            self._task = tasks[0] if comm.is_root else Task(told[0], told[1], {})
        plain = request.plain if comm.is_root else []
        share = pick_share(captured, self._task.share)
        mine: list[CapturedState | State] = [*share, *plain, *self._tiles]
        if self._survey is not None:
            # Before the first byte is written: every rank with tiles must see it.
            try:
                agree(
                    comm, "joining a generation", lambda: self._open(mine), error=SaveError
                )
            except BaseException:
                self.drop()
                raise
        return mine

    def write(
        self, mine: Sequence[CapturedState | State], image: ShardImage | None = None
    ) -> None:
        """Write this rank's files. Not collective. On any thread; no MPI.

        Args:
            mine: What `begin` returned, or a copy of it.
            image: As for `write_shard`.

        Raises:
            SaveError: On the calling rank.
        """
        carried = self._carried()
        try:
            self._write(mine, carried, image)
        except BaseException:
            if carried is not None:
                carried.drain()
            raise

    @property
    def carries(self) -> bool:
        """Whether this rank writes tiles of others."""
        return self._survey is not None and bool(self._survey.mine.carried)

    def _writes(self, one: CapturedState | State) -> bool:
        """Return whether this rank writes some contents, rather than hand them over."""
        if not isinstance(one, CapturedTiles) or self._survey is None:
            return True
        return self._survey.mine.writer == self._session.comm.rank

    def _carried(self) -> CarriedTiles | None:
        """Return the tiles that this rank writes for others, if any."""
        tiles = {} if self._survey is None else self._survey.mine.carried
        return CarriedTiles(self._session.comm, tiles) if tiles else None

    def _write(
        self,
        mine: Sequence[CapturedState | State],
        carried: CarriedTiles | None,
        image: ShardImage | None,
    ) -> None:
        comm = self._session.comm
        tiles: dict[str, list[CapturedTiles]] = {}
        captured: list[CapturedState] = []
        for one in mine:
            if isinstance(one, CapturedTiles):
                tiles.setdefault(one.name, []).append(one)
            elif isinstance(one, CapturedState):
                captured.append(one)
        with self._parts.handed_over():
            partial = self._open(mine)
            if self._draft is not None:
                plain = [one for one in mine if not isinstance(one, CapturedState)]
                self._draft.write(captured, plain, image)
            elif partial is not None:
                write_shard(partial, captured, shard_file_name(comm.rank), image)
        if self._survey is None:
            return
        writer = self._survey.mine.writer
        if writer != comm.rank:
            hand_over(comm, writer, tiles)
        elif partial is not None:
            self._own = OwnTiles(self._write_tiles(partial, tiles, carried))

    def _write_tiles(
        self,
        partial: Partial,
        tiles: Mapping[str, Sequence[CapturedTiles]],
        carried: CarriedTiles | None,
    ) -> dict[str, WrittenTiles]:
        """Share the tiles that have not changed since the last save; write the others."""
        session, io = self._session, self._session.options.io
        shared: dict[str, WrittenTiles] = {}
        if io.reuse and carried is None:
            root = session.directory.root
            shared = self._history.share_unchanged(
                root, partial, tiles, runs_of, io.full_every
            )
        rest = {state: of_state for state, of_state in tiles.items() if state not in shared}
        written = write_own_tiles(
            partial,
            rest,
            session.comm.rank,
            carried,
            kept=bool(session.options.asynchronous),
        )
        return {**shared, **written}

    @property
    def history(self) -> TileHistory:
        """What this rank has in the generation, once that is published."""
        assert self._task is not None
        return TileHistory(self._task.generation, self._own.states)

    def gather_files(self) -> list[bytes]:
        """Return on root the files of tiles of all ranks, encoded.

        Collective. Main thread only. Every rank has written its files.
        """
        if self._survey is None or self._task is None:
            return []
        mine = self._own.encode(self._task.generation)
        return gather_bytes(self._session.comm, mine, "publishing")

    def publish(self, files: Sequence[bytes], clock: PhaseClock) -> Published:
        """Publish the generation. Not collective. On root.

        Args:
            files: What `gather_files` returned.
            clock: The save's.

        Raises:
            SaveError: On the calling rank; nothing was published.
        """
        assert self._draft is not None
        captured, number = self._draft.captured, self._draft.partial.generation
        others = [
            foresee_shard(pick_share(captured, share), rank, number)
            for rank, share in self._shares.items()
            if rank != ROOT
        ]
        joined = None if self._survey is None else self._survey.joined
        tiles = None if joined is None else TileFiles.join(files, joined.leaves, number)
        with clock.phase("publish"), without_collections():
            return self._draft.publish([one for one in others if one], tiles)

    def drop(self) -> None:
        """Remove the partial. Not collective. No rank still writes."""
        if self._draft is not None:
            self._draft.drop()

    def _open(self, mine: Sequence[CapturedState | State]) -> Partial | None:
        """Open the generation that root has begun, on a rank that writes."""
        if self._draft is not None:
            self._partial = self._draft.partial
        elif self._partial is None and (self.carries or any(map(self._writes, mine))):
            assert self._task is not None
            task = self._task
            self._partial = self._session.directory.join(task.generation, task.job)
        if self._partial is not None:
            self._partial.progress = self._progress
        return self._partial


class LoneWrite:
    """A generation that root alone writes. Not collective. On any thread.

    Args:
        session: The manager's.
        clock: The save's.
        known: Fingerprints of what the newest generation holds.
    """

    def __init__(self, session: Session, clock: PhaseClock, known: KnownLeaves) -> None:
        self._session = session
        self._clock = clock
        self._known = known
        self._draft: Draft | None = None

    def write(self, request: SaveRequest, image: ShardImage | None) -> None:
        """Write all files but the manifest.

        Args:
            request: What to save.
            image: As for `write_shard`.

        Raises:
            SaveError: On the calling rank; no files are left behind.
        """
        session = self._session
        with self._clock.phase("write"):
            draft = Draft.begin(
                session.directory, request, session.options, known=self._known
            )
            draft.partial.progress = self._clock.progress
            try:
                draft.write(draft.fresh_states, request.plain, image)
            except BaseException:
                draft.drop()
                raise
        self._draft = draft

    def digested(self, states: Iterable[CapturedState]) -> list[CapturedState]:
        """Return some of the written states with their digests."""
        assert self._draft is not None
        found = {one.name: one for one in self._draft.digested()}
        return [found[one.name] for one in states]

    def publish(self) -> Published:
        """Make the generation exist.

        Raises:
            SaveError: On the calling rank; nothing was published.
        """
        draft, self._draft = self._draft, None
        assert draft is not None
        with draft, self._clock.phase("publish"):
            return draft.publish()

    def drop(self) -> None:
        """Remove the files, unless they are being written or published."""
        if self._draft is not None:
            self._draft.drop()
