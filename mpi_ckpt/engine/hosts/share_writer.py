# SPDX-License-Identifier: Apache-2.0
"""Writes one host's files of a local generation. No MPI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.engine.save.shard import write_shard
from mpi_ckpt.engine.save.staging import stage
from mpi_ckpt.engine.sync.captured import CapturedState
from mpi_ckpt.errors import SaveError, StageError
from mpi_ckpt.storage.format.manifest_codec import encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mpi_ckpt.engine.hosts.level import HostLevel
    from mpi_ckpt.engine.hosts.share_plan import SharePlan
    from mpi_ckpt.engine.hosts.tile_copies import TileCopies
    from mpi_ckpt.memory import Arena
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.storage.format.manifest import StoredFile
    from mpi_ckpt.storage.writing.partial import Partial


class ShareWriter:
    """Writes the files that one host holds. Not collective. By one thread at a time.

    Args:
        level: The local level.
        plan: The generation.
        host: Index of this host.
        sent: Name -> bytes of the files that only root knew.
    """

    def __init__(
        self,
        level: HostLevel,
        plan: SharePlan,
        host: int,
        sent: Mapping[str, memoryview],
        copies: TileCopies | None = None,
    ) -> None:
        self._level = level
        self._plan = plan
        self._sent = dict(sent)
        self._copies = copies
        self._partial: Partial | None = None
        self._files = plan.held_by(host)
        names = {file.name for file in self._files}
        self._shares: Mapping[str, Sequence[CapturedState]] = {
            name: share for name, share in plan.shares.items() if name in names
        }

    def stage(self, arena: Arena, tiles: Arena) -> None:
        """Copy this host's files, since the training goes on while they are written.

        Main thread only, if there are tiles: they come from other ranks.

        Args:
            arena: Holds the copies of shares; an earlier copy in it is lost.
            tiles: Holds the files of tiles; an earlier copy in it is lost.

        Raises:
            StageError: On the calling rank, if memory is short, or a tile cannot be read.
        """
        self._stage_tiles(tiles)
        flat = [content for share in self._shares.values() for content in share]
        staged = stage(arena, flat)
        staged.late.copy()
        copies = iter(one for one in staged.states if isinstance(one, CapturedState))
        self._shares = {
            name: [next(copies) for _ in share] for name, share in self._shares.items()
        }

    def write(self, clock: PhaseClock) -> None:
        """Write the files and the manifest, all durable.

        On any thread; on the main thread if there are tiles that were not staged.

        Args:
            clock: The save's.

        Raises:
            SaveError: On the calling rank.
        """
        with clock.phase("write"):
            partial = self._begin()
            self._write_tiles(partial)
            for name, share in self._shares.items():
                write_shard(partial, share, name)
            for file in self._files:
                if file.name in self._sent:
                    partial.write_shard(file.name, [self._sent[file.name]], file.nbytes)
            partial.seal(encode(self._plan.manifest))

    def _begin(self) -> Partial:
        home, nbytes = self._level.home, sum(file.nbytes for file in self._files)
        number, reserve = self._plan.manifest.generation, self._level.local.reserve
        try:
            if home is None:
                raise SaveError("the directory of this host cannot be used")
            self._partial = home.begin(number, nbytes, reserve)
        except BaseException:
            if self._copies is not None:
                self._copies.pass_on(None)  # other hosts wait for it
            raise
        return self._partial

    def _write_tiles(self, partial: Partial) -> None:
        """Write the files of tiles while they come."""

        def keep(file: StoredFile, runs: Iterator[memoryview]) -> None:
            partial.write_shard(file.name, runs, file.nbytes)

        if self._copies is not None:
            self._copies.pass_on(keep)

    def _stage_tiles(self, arena: Arena) -> None:
        """Let the files of tiles come into memory, since later no rank sends any."""
        copies, self._copies = self._copies, None
        if copies is None:
            return
        names = {file.name for file in self._plan.tiles.files}
        files = [file for file in self._files if file.name in names]
        try:
            memory = arena.take(sum(file.nbytes for file in files))
        except OSError as error:
            copies.pass_on(None)
            raise StageError(
                f"no memory for the tiles of this host ({error}); "
                "Options(asynchronous=False) keeps a few pieces of them at a time"
            ) from error
        for file in files:
            self._sent[file.name] = memory[: file.nbytes]
            memory = memory[file.nbytes :]

        def keep(file: StoredFile, runs: Iterator[memoryview]) -> None:
            room, start = self._sent[file.name], 0
            for run in runs:
                room[start : start + len(run)] = run
                start += len(run)

        copies.pass_on(keep)

    def appear(self) -> None:
        """Give what was written its name.

        Raises:
            SaveError: On the calling rank.
        """
        if self._partial is not None:
            self._partial.appear()

    def drop(self) -> None:
        """Remove what was written: another host could not write, or name, its part."""
        if self._partial is None:
            return
        self._partial.drop()
        if self._level.home is not None:
            self._level.home.withdraw(self._partial.generation)
