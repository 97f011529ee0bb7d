# SPDX-License-Identifier: Apache-2.0
"""What a save takes of the disk, foreseen before a byte of it is written. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mpi_ckpt.engine.save.staging import StagedStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.state import State

# What the manifest, and the header of a file, say of a leaf takes at least this much and
# its name. Less than it takes is foreseen on purpose: nothing that fits may be refused.
_MANIFEST_ENTRY_BYTES = 100
_HEADER_ENTRY_BYTES = 50


class SpaceNeeded(NamedTuple):
    """Bytes that will be written and files that will be made, by all ranks, or more."""

    nbytes: int
    files: int


def foresee_space(
    captured: Sequence[CapturedState],
    fresh: Sequence[Sequence[int]],
    plain: Sequence[State],
) -> SpaceNeeded:
    """Return what a save takes at least.

    Not collective. Thread-safe. What a plain state writes is known only if it is staged.

    Args:
        captured: What is saved of leaf states.
        fresh: Of each of them, the indices of the leaves that must be written.
        plain: The states that write themselves.
    """
    every = [spec for one in captured for spec in one.specs]
    written = [
        one.specs[number]
        for one, numbers in zip(captured, fresh, strict=True)
        for number in numbers
    ]
    manifest = sum(len(spec.name) + _MANIFEST_ENTRY_BYTES for spec in every)
    headers = sum(len(spec.name) + _HEADER_ENTRY_BYTES for spec in written)
    leaves = sum(spec.nbytes for spec in written)
    streams = sum(one.nbytes for one in plain if isinstance(one, StagedStream))
    return SpaceNeeded(
        nbytes=manifest + headers + leaves + streams,
        files=1 + bool(written) + len(plain),  # the manifest first
    )
