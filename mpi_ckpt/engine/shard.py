# SPDX-License-Identifier: Apache-2.0
"""The leaves that one rank writes of a generation: one safetensors file. No MPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.digest import Digest, digest_bytes
from mpi_ckpt.engine.plan import ShardPlan, plan_shard
from mpi_ckpt.storage.layout import shard_file_name
from mpi_ckpt.storage.manifest import Extent, StoredFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mpi_ckpt.engine.contents import Contents
    from mpi_ckpt.storage.partial import Partial

__all__ = ["LeafKey", "Shard", "foresee_shard", "write_shard"]

LeafKey = tuple[str, str]
"""Names of the state and of the leaf."""


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
    names = [one.name for one in contents]
    digests: dict[LeafKey, Digest] = {}

    def runs() -> Iterator[memoryview]:
        yield memoryview(plan.header)
        for place in plan.placements:
            one = contents[place.state]
            leaf = one.leaves[place.leaf]
            data = leaf.buffer.read()
            digest = one.digests[place.leaf] if one.digests else Digest.of(data)
            digests[names[place.state], leaf.spec.name] = digest
            yield data

    partial.write_shard(shard_file_name(rank), runs(), plan.nbytes)
    return _describe(plan, contents, digests, rank, partial.generation)


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
    digests = {
        (one.name, leaf.spec.name): digest
        for one in contents
        for leaf, digest in zip(one.leaves, one.digests or (), strict=True)
    }
    return _describe(_plan(contents), contents, digests, rank, generation)


def _plan(contents: Sequence[Contents]) -> ShardPlan:
    return plan_shard([(one.name, one.specs) for one in contents])


def _describe(
    plan: ShardPlan,
    contents: Sequence[Contents],
    digests: Mapping[LeafKey, Digest],
    rank: int,
    generation: int,
) -> Shard:
    name = shard_file_name(rank)
    names = [one.name for one in contents]
    extents: dict[LeafKey, Extent] = {}
    for place in plan.placements:
        spec = contents[place.state].leaves[place.leaf].spec
        key = (names[place.state], spec.name)
        extents[key] = Extent(name, place.offset, spec.nbytes, digests[key])
    header = digest_bytes(plan.header)
    file = StoredFile(name, plan.nbytes, len(plan.header), header, generation)
    return Shard(file, extents)
