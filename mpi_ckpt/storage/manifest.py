# SPDX-License-Identifier: Apache-2.0
"""What a manifest says, as frozen values; `manifest_codec` turns it to bytes and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpi_ckpt.digest import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpi_ckpt.digest import Digest
    from mpi_ckpt.leaf import LeafSpec

__all__ = ["Extent", "Manifest", "StoredFile", "StoredLeaf", "StoredState"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a generation.

    Attributes:
        name: Name in the generation's directory.
        nbytes: Size in bytes.
        header_bytes: Bytes before the first leaf; 0 where there is no header.
        header_digest: xxh3-128 of those bytes, 16 bytes.
        generation: The generation that wrote it; older than the manifest's where the
            file is shared by hard link.
    """

    name: str
    nbytes: int
    header_bytes: int
    header_digest: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file, and its digest."""

    file: str
    offset: int
    nbytes: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class StoredLeaf:
    """One leaf of a state and where its bytes are."""

    spec: LeafSpec
    extent: Extent


@dataclass(frozen=True, slots=True)
class StoredState:
    """One state: either leaves and a structure, or one stream.

    Attributes:
        name: The state's name.
        structure: JSON values; None for a stream.
        leaves: The leaves, in the state's order; empty for a stream.
        stream: Where the stream is; None for a state of leaves.
    """

    name: str
    structure: Any = None
    leaves: tuple[StoredLeaf, ...] = ()
    stream: Extent | None = None

    @property
    def extents(self) -> list[Extent]:
        """All runs of bytes of this state, in order."""
        return (
            [leaf.extent for leaf in self.leaves] if self.stream is None else [self.stream]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know about a generation.

    Attributes:
        generation: Its number.
        step: Training step, given by the user.
        time: Seconds since the epoch, by root's clock.
        job: Name of the job that wrote it.
        size: Number of ranks of that job.
        metrics: Given by the user, for retention.
        block_bytes: Block length of all digests.
        files: The files beside the manifest.
        states: The states, in saving order.
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

    def state(self, name: str) -> StoredState | None:
        """Return the state of that name, None if there is none. Not collective."""
        return next((state for state in self.states if state.name == name), None)
