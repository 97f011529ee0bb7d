# SPDX-License-Identifier: Apache-2.0
"""Writes one host's files of a local generation. No MPI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.engine.save.shard import write_shard
from mpi_ckpt.engine.save.staging import stage
from mpi_ckpt.engine.sync.captured import CapturedState
from mpi_ckpt.errors import SaveError
from mpi_ckpt.storage.format.manifest_codec import encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.engine.hosts.level import HostLevel
    from mpi_ckpt.engine.hosts.share_plan import SharePlan
    from mpi_ckpt.memory import Arena
    from mpi_ckpt.reports import PhaseClock
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
    ) -> None:
        self._level = level
        self._plan = plan
        self._sent = sent
        self._partial: Partial | None = None
        self._files = plan.held_by(host)
        names = {file.name for file in self._files}
        self._shares: Mapping[str, Sequence[CapturedState]] = {
            name: share for name, share in plan.shares.items() if name in names
        }

    def stage(self, arena: Arena) -> None:
        """Copy this host's shares, since the training goes on while they are written.

        Args:
            arena: Holds the copies; an earlier copy in it is lost.

        Raises:
            StageError: On the calling rank, if memory is short.
        """
        flat = [content for share in self._shares.values() for content in share]
        staged = stage(arena, flat)
        staged.late.copy()
        copies = iter(one for one in staged.states if isinstance(one, CapturedState))
        self._shares = {
            name: [next(copies) for _ in share] for name, share in self._shares.items()
        }

    def write(self, clock: PhaseClock) -> None:
        """Write the files and the manifest, all durable. On any thread.

        Args:
            clock: The save's.

        Raises:
            SaveError: On the calling rank.
        """
        home, plan = self._level.home, self._plan
        if home is None:
            raise SaveError("the directory of this host cannot be used")
        with clock.phase("write"):
            nbytes = sum(file.nbytes for file in self._files)
            reserve = self._level.local.reserve
            self._partial = partial = home.begin(plan.manifest.generation, nbytes, reserve)
            for name, share in self._shares.items():
                write_shard(partial, share, name)
            for file in self._files:
                if file.name in plan.bound:
                    partial.write_shard(file.name, [self._sent[file.name]], file.nbytes)
            partial.seal(encode(plan.manifest))

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
