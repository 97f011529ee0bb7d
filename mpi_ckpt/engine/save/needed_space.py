# SPDX-License-Identifier: Apache-2.0
"""Estimates the disk space of a save, before its first byte is written. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mpi_ckpt.engine.save.staging import StagedStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.state import State

# An entry for a leaf in the manifest, or in a file's header, takes at least this much and
# its name. The estimate is low on purpose: a save that fits must not be refused.
_MANIFEST_ENTRY_BYTES = 100
_HEADER_ENTRY_BYTES = 50


class SpaceNeeded(NamedTuple):
    """A lower bound of the bytes and files that all ranks will write."""

    nbytes: int
    files: int


def foresee_space(
    captured: Sequence[CapturedState],
    fresh: Sequence[Sequence[int]],
    plain: Sequence[State],
) -> SpaceNeeded:
    """Return the least space that a save takes.

    Not collective. Thread-safe. The size of a plain state is known only if it is staged.

    Args:
        captured: The contents of the leaf states.
        fresh: For each of them, the indices of the leaves that must be written.
        plain: The states that write themselves.
    """
    rests = [content.form.pick(n) for content, n in zip(captured, fresh, strict=True)]
    every = [name for content in captured for name in content.form.names]
    written = [name for form in rests for name in form.names]
    manifest = sum(map(len, every)) + _MANIFEST_ENTRY_BYTES * len(every)
    headers = sum(map(len, written)) + _HEADER_ENTRY_BYTES * len(written)
    leaves = sum(form.nbytes for form in rests)
    streams = sum(stream.nbytes for stream in plain if isinstance(stream, StagedStream))
    return SpaceNeeded(
        nbytes=manifest + headers + leaves + streams,
        files=1 + bool(written) + len(plain),  # the manifest first
    )
