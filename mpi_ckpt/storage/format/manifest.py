# SPDX-License-Identifier: Apache-2.0
"""Defines the contents of a manifest as frozen values; `manifest_codec` encodes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from mpi_ckpt.digest import BLOCK_BYTES
from mpi_ckpt.leaf import LeafSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.decomposition.boxes import Box
    from mpi_ckpt.digest import Digest
    from mpi_ckpt.storage.format.local_set import LocalSet

STREAM = "stream"
"""Name of the one leaf of what a state wrote itself."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a generation.

    Attributes:
        name: Name in the generation's directory.
        nbytes: Size in bytes.
        header_bytes: Bytes before the first leaf; 0 if there is no header.
        header_digest: xxh3-128 of those bytes, 16 bytes.
        generation: The generation that wrote it; older than the manifest's if the file is
            shared by hard link.
    """

    name: str
    nbytes: int
    header_bytes: int
    header_digest: bytes
    generation: int

    def to_json(self) -> list[Any]:
        """Return the file as JSON values. Not collective. Thread-safe."""
        digest = self.header_digest.hex()
        return [self.name, self.nbytes, self.header_bytes, digest, self.generation]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> StoredFile:
        """Return the file that `to_json` encoded. Not collective. Thread-safe."""
        name, nbytes, header_bytes, digest, generation = values
        return cls(name, nbytes, header_bytes, bytes.fromhex(digest), generation)


# Named tuples, not dataclasses: thousands are made at a time, five times as fast.
class Extent(NamedTuple):
    """A run of bytes in a file: name of the file, offset and length in bytes."""

    file: str
    offset: int
    nbytes: int


class StoredLeaf(NamedTuple):
    """One leaf of a state: the position of its bytes, and their digest."""

    spec: LeafSpec
    extent: Extent
    digest: Digest


class CutLeaf(NamedTuple):
    """One leaf that is cut over the ranks: its tiles are listed in their files' headers.

    Attributes:
        spec: Name, type and shape of the whole leaf.
        tiles: Number of its tiles in all files of the state.
    """

    spec: LeafSpec
    tiles: int


class StoredTile(NamedTuple):
    """One tile of a cut leaf: its box, and its bytes as those of a leaf.

    Attributes:
        box: The box, in the indices of the whole leaf.
        leaf: Its name in the file, dtype and shape; the position of its bytes, in C order
            of the box; their digest.
    """

    box: Box
    leaf: StoredLeaf


@dataclass(frozen=True, slots=True)
class StoredState:
    """One state: leaves and a structure, or one stream.

    Attributes:
        name: The state's name.
        structure: JSON values; None for a stream.
        leaves: The whole leaves, in the state's order; a stream has one leaf of bytes.
        is_stream: Whether it is the stream of a plain state.
        cut: The leaves that are cut over the ranks.
        files: Names of the files that have tiles of these; such a file may have tiles of
            other states beside them, which count only for the states that name the file.
    """

    name: str
    structure: Any = None
    leaves: tuple[StoredLeaf, ...] = ()
    is_stream: bool = False
    cut: tuple[CutLeaf, ...] = ()
    files: tuple[str, ...] = ()

    @classmethod
    def of_stream(cls, name: str, extent: Extent, digest: Digest) -> StoredState:
        """Make the state of a stream. Not collective."""
        spec = LeafSpec(STREAM, "U8", (extent.nbytes,))
        return cls(name, leaves=(StoredLeaf(spec, extent, digest),), is_stream=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all its leaves."""
        whole = sum(leaf.extent.nbytes for leaf in self.leaves)
        return whole + sum(leaf.spec.nbytes for leaf in self.cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know about a generation.

    Attributes:
        generation: Its number.
        step: Training step, given by the user.
        time: Seconds since the epoch, by root's clock.
        job: Name of the job that wrote it.
        size: Number of ranks of that job.
        metrics: Metrics given by the user, for retention.
        block_bytes: Block length of all digests.
        files: The files beside the manifest.
        states: The states, in saving order.
        local: Where its files are, if it lies on several hosts; None for others.
    """

    generation: int
    step: int
    time: float
    job: str
    size: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    block_bytes: int = BLOCK_BYTES
    files: tuple[StoredFile, ...] = ()
    states: tuple[StoredState, ...] = ()
    local: LocalSet | None = None

    @property
    def leaves(self) -> list[StoredLeaf]:
        """The leaves of all states, in order."""
        return [leaf for state in self.states for leaf in state.leaves]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(state.nbytes for state in self.states)

    @property
    def bytes_reused(self) -> int:
        """Bytes of leaves in files of older generations."""
        older = {file.name for file in self.files if file.generation != self.generation}
        return sum(leaf.extent.nbytes for leaf in self.leaves if leaf.extent.file in older)

    def state(self, name: str) -> StoredState | None:
        """Return the state of that name, None if there is none. Not collective."""
        return next((state for state in self.states if state.name == name), None)
