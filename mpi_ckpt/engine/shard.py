# SPDX-License-Identifier: Apache-2.0
"""The leaves that one rank writes of a generation: one safetensors file. No MPI."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from mpi_ckpt.digest import BLOCK_BYTES, Digest, digest_bytes, split_blocks
from mpi_ckpt.engine.plan import LeafKey, ShardPlan, plan_shard
from mpi_ckpt.storage.layout import shard_file_name
from mpi_ckpt.storage.manifest import Extent, StoredFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mpi_ckpt.engine.contents import Contents
    from mpi_ckpt.leaf import Form
    from mpi_ckpt.storage.partial import Partial

__all__ = ["Shard", "foresee_shard", "write_shard"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's file of a generation.

    Attributes:
        file: The file.
        extents: Where in it each leaf lies.
    """

    file: StoredFile
    extents: Mapping[LeafKey, Extent]


def write_shard(partial: Partial, contents: Sequence[Contents], rank: int) -> Shard | None:
    """Write all leaves of some contents in one durable file.

    Not collective. Leaves not digested yet are digested here, while earlier bytes are on
    their way to disk.

    Args:
        partial: The generation being written.
        contents: What this rank writes.
        rank: This rank.

    Returns:
        The file; None if there is no leaf to write.

    Raises:
        SaveError: On the calling rank.
    """
    if not any(one.leaves for one in contents):
        return None
    plan = _plan(contents)
    digests: list[Digest] = []

    def runs() -> Iterator[memoryview]:
        yield memoryview(plan.header)
        for place in plan.placements:
            one = contents[place.state]
            data = one.leaves[place.leaf].buffer.read()
            if one.digests:
                digests.append(one.digests[place.leaf])
                yield data
                continue
            # Block by block: while a large leaf is digested, the disk would run idle.
            blocks = []
            for block in split_blocks(data, BLOCK_BYTES):
                blocks.append(digest_bytes(block))
                yield block
            digests.append(Digest(tuple(blocks)))

    partial.write_shard(shard_file_name(rank), runs(), plan.nbytes)
    return _describe(plan, digests, rank, partial.generation)


def foresee_shard(contents: Sequence[Contents], rank: int, generation: int) -> Shard | None:
    """Tell what `write_shard` makes on another rank, of contents that are digested.

    Not collective. Thread-safe.

    Args:
        contents: Equal to those of the other rank.
        rank: The other rank.
        generation: The generation being written.
    """
    if not any(one.leaves for one in contents):
        return None
    plan = _plan(contents)
    digests = [(contents[at.state].digests or ())[at.leaf] for at in plan.placements]
    return _describe(plan, digests, rank, generation)


def _plan(contents: Sequence[Contents]) -> ShardPlan:
    return _plan_forms(tuple((one.name, one.form) for one in contents))


@lru_cache(maxsize=4)
def _plan_forms(forms: tuple[tuple[str, Form], ...]) -> ShardPlan:
    # From save to save the forms are the same as a rule, and the plan with them.
    return plan_shard([(name, form.specs) for name, form in forms])


def _describe(
    plan: ShardPlan, digests: Sequence[Digest], rank: int, generation: int
) -> Shard:
    name = shard_file_name(rank)
    extents = {
        at.key: Extent(name, at.offset, at.nbytes, digest)
        for at, digest in zip(plan.placements, digests, strict=True)
    }
    header = digest_bytes(plan.header)
    file = StoredFile(name, plan.nbytes, len(plan.header), header, generation)
    return Shard(file, extents)
