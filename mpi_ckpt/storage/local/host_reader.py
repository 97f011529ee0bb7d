# SPDX-License-Identifier: Apache-2.0
"""Reads a local generation on root, whose host may lack some of its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.reading.file_reader import prove_header
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mpi_ckpt.storage.format.manifest import Manifest, StoredFile, StoredLeaf


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

    def read_header(self, file: StoredFile) -> bytes:
        """See `FileReader`. Not collective. Thread-safe."""
        data = self._headers.get(file.name)
        if data is None:
            return super().read_header(file)
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
