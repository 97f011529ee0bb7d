# SPDX-License-Identifier: Apache-2.0
"""Manages the directory of one host in a local level: an ordinary checkpoint directory.

Each generation in it has the manifest of the whole, and some of the files. Used by the
leader of the host alone.
"""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.errors import (
    CheckpointError,
    CorruptGenerationError,
    ReadError,
    RestoreError,
    SaveError,
    WriteError,
)
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import CheckpointDirectory, recovery
from mpi_ckpt.storage.faults import in_words, os_errors_as
from mpi_ckpt.storage.format.layout import MANIFEST, generation_name
from mpi_ckpt.storage.format.manifest_codec import MANIFEST_BYTES_MAX
from mpi_ckpt.storage.local.mapped_files import MappedFiles
from mpi_ckpt.storage.owning.ownership import IN_MEMORY, local_file_system
from mpi_ckpt.storage.reading.file_reader import prove_header
from mpi_ckpt.storage.reading.reader import GenerationReader, read_manifest
from mpi_ckpt.storage.writing.space import free_space

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mpi_ckpt.storage.format.manifest import Manifest, StoredFile, StoredLeaf
    from mpi_ckpt.storage.local.mapped_files import MappedFile
    from mpi_ckpt.storage.writing.outfile import IOMode
    from mpi_ckpt.storage.writing.partial import Partial

logger = logging.getLogger(__name__)


_TOKEN = ".here-"
_MEMINFO = Path("/proc/meminfo")
MAPPED_BYTES_MIN = 8 << 20
"""Fewer bytes are written to a file system in memory as to any other."""


class HostDirectory:
    """The directory of one host. Not collective. Not thread-safe.

    Args:
        path: The directory; it and its parents need not exist.
        mode: How files are written.

    Attributes:
        path: The directory.
        is_in_memory: Whether its file system lies in memory: a power cut empties it.
    """

    def __init__(self, path: Path, mode: IOMode) -> None:
        self.path = path
        self._directory = CheckpointDirectory(path, mode)
        self.is_in_memory = local_file_system(path) in IN_MEMORY
        self._mapped = MappedFiles(path)

    @property
    def highest(self) -> int:
        """The highest number of a generation here so far."""
        return self._directory.catalog.highest

    def show(self, token: str, rank: int) -> None:
        """Make the directory, and a file in it that shows that this rank uses it.

        Args:
            token: Name of this start, the same on all ranks.
            rank: This rank.

        Raises:
            SaveError: On the calling rank, if it cannot be made.
        """
        with os_errors_as(SaveError, "making", self.path):
            filesystem.make_directories(self.path)
            name = f"{_TOKEN}{token}-{rank}"
            with filesystem.create_file(self.path / name):
                pass

    def others(self, token: str, rank: int) -> list[int]:
        """Return the ranks of other hosts that show themselves in this directory.

        Args:
            token: As for `show`.
            rank: This rank.
        """
        mine = f"{_TOKEN}{token}-"
        with suppress(OSError):
            names = filesystem.list_names(self.path)
            ranks = [int(n.removeprefix(mine)) for n in names if n.startswith(mine)]
            return [other for other in ranks if other != rank]
        return []

    def own(self) -> None:
        """Lock the directory, and sweep leftovers. Idempotent.

        Raises:
            LockedError: On the calling rank, if another job holds it.
            SaveError: On the calling rank, if it cannot be used.
        """
        with suppress(OSError):  # leftovers of an earlier start are in nobody's way
            for name in filesystem.list_names(self.path):
                if name.startswith(_TOKEN):
                    filesystem.remove_file(self.path / name)
        self._directory.own()
        self._mapped.sweep()
        self._directory.catalog.look()

    def close(self) -> None:
        """Release the lock. Callable twice."""
        self._mapped.close()
        self._directory.close()

    def generations(self) -> Iterator[tuple[GenerationReader, bytes]]:
        """Yield the generations here, opened, each with the bytes of its manifest.

        A file that is damaged, or cannot be read, is set aside.
        """
        for number in self._directory.catalog.look().generations:
            try:
                with self.open(number) as reader:
                    yield reader, self.manifest_of(number)
            except (CheckpointError, OSError) as error:
                logger.warning("a generation on this host is not used: %s", error)

    def manifest_of(self, number: int) -> bytes:
        """Return the bytes of the manifest of a generation.

        Raises:
            OSError: On the calling rank, if it cannot be read.
        """
        path = self.path / generation_name(number) / MANIFEST
        return filesystem.read_start(path, MANIFEST_BYTES_MAX)

    def open(self, number: int) -> GenerationReader:
        """Open what this host has of a generation.

        Raises:
            RestoreError: On the calling rank, if its manifest cannot be used; a damaged one
                is set aside.
        """
        path = self.path / generation_name(number)
        while True:
            try:
                reader = GenerationReader(path)
            except (CorruptGenerationError, ReadError) as problem:
                name = Path(problem.path or path).name
                if name in (MANIFEST, path.name):
                    if isinstance(problem, CorruptGenerationError):
                        self._directory.reject(number, problem)
                    raise
                if not self.set_aside(number, name, problem):
                    raise
                continue
            if reader.manifest.local is None:
                reader.close()
                raise RestoreError(f"{path} is no part of a local generation", path=path)
            return reader

    def set_aside(self, number: int, name: str, problem: CheckpointError) -> bool:
        """Quarantine a file that is damaged, or cannot be read: others have copies.

        Args:
            number: The generation.
            name: Name of the file in it.
            problem: What is wrong with it.

        Returns:
            Whether it is no longer where it was.
        """
        source = self.path / generation_name(number) / name
        where = recovery.quarantine_file(self.path, number, name, problem)
        logger.warning(
            "a copy on this host is not used, others are looked for: %s; it is kept in %s",
            problem,
            where,
        )
        return where != source

    def begin(self, number: int, nbytes: int, reserve: int) -> Partial:
        """Start a generation.

        Args:
            number: Its number.
            nbytes: Bytes that this host will write.
            reserve: Bytes that must stay free.

        Raises:
            SaveError: On the calling rank; a WriteError with ENOSPC if too little space
                would stay free.
        """
        self._require_room(nbytes, reserve)
        partial = self._directory.begin(number)
        if partial.generation != number:
            partial.drop()
            raise SaveError(
                f"{self.path} has a generation {partial.generation - 1}, which this job "
                "has not made: move it elsewhere",
                path=self.path,
            )
        return partial

    def map_files(self, sizes: Sequence[int], reserve: int) -> list[MappedFile] | None:
        """Return files to copy into, which a generation that is begun then takes in.

        Args:
            sizes: Their lengths in bytes.
            reserve: Bytes that must stay free.

        Returns:
            The files; None if writing is faster than mapping here.

        Raises:
            SaveError: On the calling rank; a WriteError with ENOSPC if too little memory
                would stay free.
        """
        if not self.is_in_memory or sum(sizes) < MAPPED_BYTES_MIN:
            return None
        self._require_room(self._mapped.missing(sizes), reserve)
        with os_errors_as(WriteError, "making files in", self.path):
            return self._mapped.take(sizes)

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Remove all generations but some; log what cannot be removed."""
        there = set(self._directory.catalog.look().generations)
        self._directory.remove(sorted(there.difference(numbers)))

    def withdraw(self, number: int) -> None:
        """Remove a generation that other hosts could not keep, if it is here."""
        if not recovery.is_gone(self.path / generation_name(number)):
            self._directory.remove([number])

    def _require_room(self, nbytes: int, reserve: int) -> None:
        free: float = free_space(self.path).nbytes
        if self.is_in_memory:
            free = min(free, _available_memory())
        if nbytes + reserve > free:
            what = "memory" if self.is_in_memory else "space"
            raise WriteError(
                f"{self.path}: {in_words(OSError(errno.ENOSPC, ''))}: {nbytes:,} bytes "
                f"needed and {reserve:,} to stay free, {free:,.0f} of {what} there; "
                "nothing of it was written",
                path=self.path,
                errno=errno.ENOSPC,
            )


def newest_below(path: Path) -> list[Manifest]:
    """Return the manifest of the newest generation in each folder of a local path.

    Not collective. Takes no lock, and leaves out what it cannot read.
    """
    found: list[Manifest] = []
    with suppress(OSError):
        for name in filesystem.list_names(path):
            with suppress(CheckpointError):
                numbers = recovery.survey(path / name).generations[:1]
                paths = [path / name / generation_name(number) for number in numbers]
                found += map(read_manifest, paths)
    return found


def _available_memory() -> float:
    with suppress(OSError, ValueError, IndexError):
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    return float("inf")


class HostReader(GenerationReader):
    """A local generation, part of which other hosts have sent.

    Not collective. Bytes that were sent are proven like those of files.

    Args:
        path: Directory of the generation on this host; it need not exist.
        manifest: Its manifest.
        sent: Name -> bytes of files that are not on this host.
        headers: Name -> header of files of tiles that are not on this host.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        sent: Mapping[str, memoryview],
        headers: Mapping[str, memoryview],
    ) -> None:
        self._sent, self._headers = dict(sent), headers
        super().__init__(path, manifest)

    def add(self, sent: Mapping[str, memoryview]) -> None:
        """Add bytes of files that are not on this host, before they are read."""
        self._sent.update(sent)

    def read_direct(self, file: str, into: memoryview, offset: int) -> int:
        """See `FileReader`. Not collective. Thread-safe."""
        data = self._sent.get(file)
        if data is None:
            return super().read_direct(file, into, offset)
        part = data[offset : offset + len(into)]
        into[: len(part)] = part
        return len(part)

    def read_header(self, file: StoredFile, most: int | None = None) -> bytes:
        """See `FileReader`. Not collective. Thread-safe."""
        data = self._headers.get(file.name)
        if data is None:
            return super().read_header(file, most)
        with self._reading(file.name):
            prove_header(file, bytes(data))
        return bytes(data)

    def read_block(self, leaf: StoredLeaf, block: int) -> memoryview:
        """See `GenerationReader`. Not collective. Thread-safe."""
        data = self._sent.get(leaf.extent.file)
        if data is None:
            return super().read_block(leaf, block)
        start = leaf.extent.offset + block * self.manifest.block_bytes
        end = leaf.extent.offset + leaf.extent.nbytes
        into = data[start : min(start + self.manifest.block_bytes, end)]
        self.prove(leaf, block, into)
        return into

    def _has_header(self, name: str) -> bool:
        return name in self._headers or super()._has_header(name)

    def _find_absent(self) -> frozenset[str]:
        try:
            there = set(filesystem.list_names(self.path))
        except OSError:
            there = set()
        names = frozenset(file.name for file in self.manifest.files)
        return (names - there) | self._sent.keys()
