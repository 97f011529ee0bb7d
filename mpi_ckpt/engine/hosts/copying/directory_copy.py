# SPDX-License-Identifier: Apache-2.0
"""Copies one local generation to the checkpoint directory, by the hosts that hold it.

begin     root begins a generation; each file gets a host that copies it
copy      each of these hosts copies its files, each block proven; on any thread
publish   root publishes, as any save
"""

from __future__ import annotations

import json
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import collect
from mpi_ckpt.errors import SaveError
from mpi_ckpt.reports import Progress
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.format.manifest_codec import encode
from mpi_ckpt.storage.format.tensorfile import HEADER_BYTES_MAX
from mpi_ckpt.storage.local.lineage import CopiedGeneration, read_lineage, write_lineage
from mpi_ckpt.storage.reading.proving import proven_blocks
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mpi_ckpt.engine.hosts.copying.token_bucket import TokenBucket
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.storage.format.manifest import Manifest, StoredFile
    from mpi_ckpt.storage.local.lineage import Origin
    from mpi_ckpt.storage.writing.partial import Partial


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A local generation, as each rank knows it.

    Attributes:
        origin: The generation; the same on every rank.
        step: Its training step; the same on every rank.
        manifest: Its manifest, on root and on the leaders that may hold some of it.
    """

    origin: Origin
    step: int
    manifest: Manifest | None


class DirectoryCopy:
    """A local generation that becomes one of the directory: call the steps in order.

    Main thread only, except `copy`.

    Args:
        session: The manager's.
        source: The local generation.

    Attributes:
        source: As given.
        nbytes: Bytes that this rank copies, once it has begun.
        share: They are this share of all bytes.
        progress: Counts those that it has copied.
    """

    def __init__(self, session: Session, source: LocalSource) -> None:
        self._session = session
        self.source = source
        self._partial: Partial | None = None
        self._number = 0
        self._job = ""
        self._mine: list[StoredFile] = []
        self.nbytes = 0
        self.share = 0.0
        self.progress = Progress(session.observer.show_soon)

    def begin(self) -> None:
        """Begin a generation on root, and deal out the files to the hosts that hold them.

        Collective.

        Raises:
            SaveError: On every rank, if no host holds some file, or root cannot begin a
                generation; nothing is left behind.
        """
        comm, manifest = self._session.comm, self.source.manifest

        def judge(parts: Sequence[bytes]) -> list[Any]:
            assert manifest is not None
            held = {rank: json.loads(part) for rank, part in enumerate(parts) if part}
            sources = _deal(manifest, held)
            self._begin_on_root(manifest)
            return [self._number, self._job, sources]

        doing = "beginning to copy a local generation"
        facts = collect(comm, doing, self._list_held, judge, error=SaveError)
        self._number, self._job, sources = facts
        if manifest is not None:
            pairs = zip(manifest.files, sources, strict=True)
            self._mine = [file for file, rank in pairs if rank == comm.rank]
            self.nbytes = sum(file.nbytes for file in self._mine)
            self.share = self.nbytes / max(1, sum(file.nbytes for file in manifest.files))

    def copy(self, bucket: TokenBucket | None = None) -> None:
        """Copy this host's files, each block proven. Not collective. On any thread; no MPI.

        Args:
            bucket: Limits the rate; None for no limit.

        Raises:
            CheckpointError: On the calling rank. The ranks must agree on the outcome.
        """
        session, home = self._session, self._home
        if not self._mine or home is None:
            return
        partial = self._partial or session.directory.join(self._number, self._job)
        with GenerationReader(home, self.source.manifest) as reader:
            for file in self._mine:
                runs = self._passed(_proven_runs(reader, file), bucket)
                partial.write_shard(file.name, runs, file.nbytes)

    def publish(self) -> tuple[Manifest, Path, int]:
        """Publish the generation. Not collective. On root. All ranks have copied.

        Returns:
            Its manifest, its directory, and the bytes of its manifest.

        Raises:
            SaveError: On the calling rank; nothing was published.
        """
        source, partial, directory = self.source, self._partial, self._session.directory
        assert partial is not None
        assert source.manifest is not None
        manifest = _of_directory(source.manifest, self._number)
        encoded = encode(manifest)
        lineage = read_lineage(directory.root)
        if lineage is not None:
            # CRASH: noted first, it may be of a generation that never appears, which its
            # time tells from any other of that number. Noted later, the copy of an old
            # generation could count as newer than all that hosts have kept since.
            copied = CopiedGeneration(self._number, manifest.time, source.origin)
            write_lineage(directory.root, lineage.with_copied(copied), directory.job)
        path = partial.publish(encoded)
        directory.note_published(manifest, path, len(encoded))
        return manifest, path, len(encoded)

    def drop(self) -> None:
        """Remove what was copied. Not collective. No rank still copies."""
        if self._partial is not None:
            self._partial.drop()

    def _passed(
        self, runs: Iterator[memoryview], bucket: TokenBucket | None
    ) -> Iterator[memoryview]:
        """Let runs pass at the rate of a bucket, and count their bytes."""
        with closing(runs):  # type: ignore[type-var]
            for run in runs:
                if bucket is not None:
                    bucket.take(len(run))
                yield run
                self.progress.count(len(run))

    @property
    def _home(self) -> Path | None:
        """The directory of the generation on this host; None if it has none."""
        level = self._session.hosts
        if level is None or level.home is None:
            return None
        return level.home.path / generation_name(self.source.origin.number)

    def _list_held(self) -> bytes:
        """Return the indices of the files that this host holds."""
        home, manifest = self._home, self.source.manifest
        if home is None or manifest is None:
            return b""
        with suppress(OSError):
            names = set(filesystem.list_names(home))
            held = [n for n, file in enumerate(manifest.files) if file.name in names]
            return json.dumps(held).encode()
        return b""  # its disk is gone: others have copies

    def _begin_on_root(self, manifest: Manifest) -> None:
        directory = self._session.directory
        directory.own()
        self._partial = partial = directory.begin()
        try:
            nbytes = sum(file.nbytes for file in manifest.files)
            partial.require_space(nbytes, len(manifest.files) + 1)
        except BaseException:
            partial.drop()
            raise
        self._number, self._job = partial.generation, directory.job


def _deal(manifest: Manifest, held: dict[int, list[int]]) -> list[int]:
    """Return for each file the rank that copies it, so that all copy about as much.

    Args:
        manifest: The generation's.
        held: Rank -> indices of the files that its host holds.
    """
    holders: list[list[int]] = [[] for _ in manifest.files]
    for rank in sorted(held):
        for file in held[rank]:
            holders[file].append(rank)
    loads = dict.fromkeys(held, 0)
    sources = [0] * len(holders)
    sizes = [file.nbytes for file in manifest.files]
    for file in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        if not holders[file]:
            raise SaveError(
                f"no host holds {manifest.files[file].name} of local generation "
                f"{manifest.generation} any more"
            )
        sources[file] = min(holders[file], key=lambda rank: (loads[rank], rank))
        loads[sources[file]] += sizes[file]
    return sources


def _proven_runs(reader: GenerationReader, file: StoredFile) -> Iterator[memoryview]:
    """Yield the bytes of a file in order, each block once it is proven."""
    if file.header_bytes:
        yield memoryview(reader.read_header(file, HEADER_BYTES_MAX))
    leaves = [one for one in reader.leaves() if one.extent.file == file.name]
    leaves.sort(key=lambda leaf: leaf.extent.offset)
    with closing(proven_blocks(reader, leaves)) as blocks:
        for _, data in blocks:
            yield data


def _of_directory(manifest: Manifest, number: int) -> Manifest:
    """Return the manifest of the same states as a generation of the directory."""
    files = tuple([replace(file, generation=number) for file in manifest.files])
    return replace(manifest, generation=number, files=files, local=None)
