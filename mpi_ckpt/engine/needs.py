# SPDX-License-Identifier: Apache-2.0
"""How much of the disk a save will take, foreseen. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.engine.stage import StagedStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.engine.contents import Contents
    from mpi_ckpt.state import State

__all__ = ["Needs", "foresee_needs"]

# What the manifest, and the header of a file, say of a leaf takes so much and its name, or
# more. Less than it takes is foreseen on purpose: nothing that fits may be refused.
_MANIFEST_ENTRY_BYTES = 100
_HEADER_ENTRY_BYTES = 50


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that will be written and files that will be made, by all ranks, or more."""

    nbytes: int
    files: int


def foresee_needs(
    contents: Sequence[Contents], fresh: Sequence[Sequence[int]], plain: Sequence[State]
) -> Needs:
    """Tell what a save takes at least.

    Not collective. Thread-safe. What a plain state writes is known only if it is staged.

    Args:
        contents: What is saved of leaf states.
        fresh: Of each of them, the indices of the leaves that must be written.
        plain: The states that write themselves.
    """
    specs = [
        one.leaves[number].spec
        for one, numbers in zip(contents, fresh, strict=True)
        for number in numbers
    ]
    every = [spec for one in contents for spec in one.specs]
    manifest = sum(len(spec.name) + _MANIFEST_ENTRY_BYTES for spec in every)
    headers = sum(len(spec.name) + _HEADER_ENTRY_BYTES for spec in specs)
    leaves = sum(spec.nbytes for spec in specs)
    streams = sum(one.nbytes for one in plain if isinstance(one, StagedStream))
    return Needs(
        nbytes=manifest + headers + leaves + streams,
        files=1 + bool(specs) + len(plain),  # the manifest first
    )
