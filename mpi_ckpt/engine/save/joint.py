# SPDX-License-Identifier: Apache-2.0
"""Writes a generation by several ranks: each its own files, root publishes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree, gather_bytes, on_root
from mpi_ckpt.engine.save.draft import Draft
from mpi_ckpt.engine.save.own_tiles import (
    CapturedTiles,
    TileFiles,
    decode_file,
    encode_file,
    write_own_tiles,
)
from mpi_ckpt.engine.save.shard import foresee_shard, write_shard
from mpi_ckpt.engine.save.sharing import Task, deal_tasks, pick_share, share_out
from mpi_ckpt.engine.sync.captured import CapturedState
from mpi_ckpt.errors import SaveError
from mpi_ckpt.options import ROOT

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mpi_ckpt.engine.save.request import Published, SaveRequest
    from mpi_ckpt.engine.save.sharing import Share
    from mpi_ckpt.engine.save.survey import TileSurvey
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.format.manifest import StoredFile
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
    """

    def __init__(
        self,
        session: Session,
        request: SaveRequest,
        survey: TileSurvey | None,
        tiles: Sequence[CapturedTiles],
    ) -> None:
        self._session = session
        self._request = request
        self._survey = survey
        self._tiles = tiles
        self._draft: Draft | None = None
        self._shares: dict[int, Share] = {}
        self._task: Task | None = None
        self._partial: Partial | None = None
        self._tile_file: StoredFile | None = None

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

        def begin() -> None:
            joined = None if self._survey is None else self._survey.joined
            with clock.phase("write"):
                self._draft = Draft.begin(
                    session.directory,
                    request,
                    options,
                    tile_bytes=0 if joined is None else joined.nbytes,
                )

        on_root(comm, "beginning a generation", begin, error=SaveError)
        tasks: list[Task] = []
        captured: Sequence[CapturedState] = request.captured
        if self._draft is not None:
            captured = self._draft.captured
            self._shares = share_out(captured, self._draft.fresh, equal, writers)
            number, job = self._draft.partial.generation, session.directory.job
            shares = [self._shares.get(rank, {}) for rank in range(comm.size)]
            tasks = [Task(number, job, share) for share in shares]
        self._task = deal_tasks(comm, tasks, options.io.window_bytes)
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

    def write(self, mine: Sequence[CapturedState | State]) -> None:
        """Write this rank's files. Not collective. On any thread; no MPI.

        Args:
            mine: What `begin` returned, or a copy of it.

        Raises:
            SaveError: On the calling rank.
        """
        rank = self._session.comm.rank
        tiles = [one for one in mine if isinstance(one, CapturedTiles)]
        leaves = [one for one in mine if isinstance(one, CapturedState)]
        captured = [one for one in leaves if not isinstance(one, CapturedTiles)]
        partial = self._open(mine)
        if self._draft is not None:
            plain = [one for one in mine if not isinstance(one, CapturedState)]
            self._draft.write(captured, plain)
        elif partial is not None:
            write_shard(partial, captured, rank)
        if partial is not None:
            self._tile_file = write_own_tiles(partial, tiles, rank)

    def gather_files(self) -> list[StoredFile | None]:
        """Return on root the files of tiles that the ranks have written.

        Collective. Main thread only. Every rank has written its files.
        """
        if self._survey is None:
            return []
        comm, mine = self._session.comm, encode_file(self._tile_file)
        return [decode_file(one) for one in gather_bytes(comm, mine, "publishing")]

    def publish(self, files: Sequence[StoredFile | None], clock: PhaseClock) -> Published:
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
        tiles = None if joined is None else TileFiles(tuple(files), joined)
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
        elif mine and self._partial is None:
            assert self._task is not None
            task = self._task
            self._partial = self._session.directory.join(task.generation, task.job)
        return self._partial
