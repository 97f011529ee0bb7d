# SPDX-License-Identifier: Apache-2.0
"""Writes one host's files of a local generation. No MPI.

The bytes pass once: leaves not digested yet are digested while they are copied or written,
and those that other hosts write while nothing is done with them here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.engine.save.shard import write_shard
from mpi_ckpt.engine.save.staging import is_on_device, stage_files
from mpi_ckpt.engine.sync.captured import CapturedState, digest_states, pick_leaves
from mpi_ckpt.errors import SaveError, StageError
from mpi_ckpt.leaves.digest import Digests, digest_bytes
from mpi_ckpt.storage.format.manifest_codec import encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mpi_ckpt.engine.hosts.level import HostLevel
    from mpi_ckpt.engine.hosts.placing import Placed
    from mpi_ckpt.engine.save.shard import ShardImage
    from mpi_ckpt.memory import Arena
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.storage.format.manifest import Manifest, StoredFile
    from mpi_ckpt.storage.local.mapped_files import MappedFile
    from mpi_ckpt.storage.writing.partial import Partial


class ShareWriter:
    """Writes the files that one host holds. Not collective. By one thread at a time.

    Args:
        level: The local level.
        placed: The generation, on this leader.
        host: Index of this host.
        threads: Threads that hash and copy.

    Attributes:
        equal: The contents that all ranks have; digested once `stage` or `write` returns.
        manifest: The manifest, once `seal` returns.
        sealed: Its digest, likewise.
    """

    def __init__(self, level: HostLevel, placed: Placed, host: int, threads: int) -> None:
        assert placed.plan is not None
        self.equal = placed.equal
        self.manifest: Manifest | None = None
        self.sealed = b""
        self._manifest_bytes = 0
        self._level = level
        self._plan = placed.plan
        self._threads = threads
        self._sent = dict(placed.sent)
        self._copies = placed.copies
        self._partial: Partial | None = None
        self._files = placed.plan.held_by(host)
        held = {file.name for file in self._files}
        self._shares = {
            name: share.pick(self.equal)
            for name, share in placed.plan.shares.items()
            if name in held
        }
        self._images: Mapping[str, ShardImage | None] = {}
        self._mapped: Mapping[str, MappedFile] = {}

    def bytes_of(self, hosts: int) -> int:
        """Return the bytes of all files on so many hosts, once `seal` has returned."""
        return self._plan.nbytes + self._manifest_bytes * hosts

    def map_files(self) -> bool:
        """Let `stage` copy into the files themselves, if they lie in memory.

        Returns:
            Whether it will.

        Raises:
            SaveError: On the calling rank, if too little memory would stay free.
        """
        home, reserve = self._level.home, self._level.local.reserve
        leaves = [leaf for of in self._shares.values() for one in of for leaf in one.leaves]
        # Devices copy fast only into memory that was made known to them.
        if home is None or not leaves or any(map(is_on_device, leaves)):
            return False
        nbytes = {file.name: file.nbytes for file in self._files}
        try:
            mapped = home.map_files([nbytes[name] for name in self._shares], reserve)
        except BaseException:
            self._let_pass()
            raise
        if mapped is not None:
            self._mapped = dict(zip(self._shares, mapped, strict=True))
        return mapped is not None

    def stage(self, arena: Arena) -> None:
        """Copy this host's shares: into the files themselves if they were mapped.

        Args:
            arena: Else holds the copies; an earlier copy in it is lost.

        Raises:
            StageError: On the calling rank, if memory is short.
        """
        places = [memoryview(one.memory) for one in self._mapped.values()]
        shares = list(self._shares.values())
        try:
            staged = stage_files(arena, shares, self._threads, places)
        except BaseException:
            self._let_pass()
            raise
        copies = [
            [one for one in file.states if isinstance(one, CapturedState)]
            for file in staged
        ]
        self._images = dict(zip(self._shares, [one.image for one in staged], strict=True))
        self._shares = dict(zip(self._shares, copies, strict=True))
        self._note_digests({n: _digests_of(share) for n, share in self._shares.items()})

    def write(self, clock: PhaseClock) -> None:
        """Write the files, all durable.

        On any thread; on the main thread if there are tiles that were not staged.

        Args:
            clock: The save's.

        Raises:
            SaveError: On the calling rank.
        """
        with clock.phase("write"):
            partial = self._begin()
            self._write_tiles(partial)
            taken = {}
            for name, mapped in self._mapped.items():
                # Only this link makes it one of a generation: until then it is free.
                partial.carry(mapped.path, name, copy=True)
            for name, share in self._shares.items():
                if name in self._mapped:
                    continue
                written = write_shard(partial, share, name, self._images.get(name))
                if written is not None:
                    taken[name] = {n: one.digests for n, one in written.states.items()}
            for file in self._files:
                if file.name in self._sent:
                    partial.write_shard(file.name, [self._sent[file.name]], file.nbytes)
            self._note_digests(taken)

    def seal(self, clock: PhaseClock) -> None:
        """Write the manifest, durable. On any thread.

        Args:
            clock: The save's.

        Raises:
            SaveError: On the calling rank.
        """
        assert self._partial is not None
        with clock.phase("write"):
            self.manifest = self._plan.manifest(self.equal)
            text = encode(self.manifest)
            self._partial.seal(text)
        self.sealed = digest_bytes(text)
        self._manifest_bytes = len(text)

    def _note_digests(self, taken: Mapping[str, Mapping[str, Digests]]) -> None:
        """Join the digests taken of shares; digest the other leaves where they are."""
        todo = [one for one in self.equal if one.digests is None]
        of_state = {one.name: [n for n in taken if one.name in taken[n]] for one in todo}
        here = {
            name: [n for share in shares for n in self._plan.shares[share].numbers[name]]
            for name, shares in of_state.items()
        }
        others = {
            one.name: np.setdiff1d(np.arange(len(one.leaves)), here[one.name]).tolist()
            for one in todo
        }
        rest = [pick_leaves(one, others[one.name]) for one in todo]
        digested = {}
        for one in digest_states(rest, self._threads):
            name = one.name
            found = [*(taken[share][name] for share in of_state[name]), one.digests]
            order = np.argsort([*here[name], *others[name]])
            joined = Digests.joined([digests for digests in found if digests is not None])
            digested[name] = joined.pick(order)
        self.equal = [
            replace(one, digests=digested.get(one.name, one.digests)) for one in self.equal
        ]

    def _begin(self) -> Partial:
        files = [file for file in self._files if file.name not in self._mapped]
        home, nbytes = self._level.home, sum(file.nbytes for file in files)
        number, reserve = self._plan.outline.generation, self._level.local.reserve
        try:
            if home is None:
                raise SaveError("the directory of this host cannot be used")
            self._partial = home.begin(number, nbytes, reserve)
        except BaseException:
            self._let_pass()
            raise
        return self._partial

    def _let_pass(self) -> None:
        """Give up this host's files, but not those that other hosts wait for."""
        if self._copies is not None:
            self._copies.pass_on(None)

    def _write_tiles(self, partial: Partial) -> None:
        """Write the files of tiles while they come."""

        def keep(file: StoredFile, runs: Iterator[memoryview]) -> None:
            partial.write_shard(file.name, runs, file.nbytes)

        if self._copies is not None:
            self._copies.pass_on(keep)

    def stage_tiles(self, arena: Arena) -> None:
        """Let the files of tiles come into memory, since later no rank sends any.

        Main thread only: they come from other ranks.

        Args:
            arena: Holds them; an earlier copy in it is lost.

        Raises:
            StageError: On the calling rank, if memory is short, or a tile cannot be read.
        """
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


def _digests_of(share: Sequence[CapturedState]) -> dict[str, Digests]:
    return {one.name: one.digests for one in share if one.digests is not None}
