# SPDX-License-Identifier: Apache-2.0
"""Writes one rank's leaves of a generation into one safetensors file. No MPI."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from mpi_ckpt import dtypes
from mpi_ckpt.digest import BLOCK_BYTES, BlockHasher, digest_bytes, split_blocks
from mpi_ckpt.engine.sync.captured import about_leaf
from mpi_ckpt.storage.format.layout import shard_file_name
from mpi_ckpt.storage.format.manifest import Extent, StoredFile, StoredLeaf
from mpi_ckpt.storage.format.tensorfile import encode_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mpi_ckpt.digest import Digest
    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.leaf import Form, LeafSpec
    from mpi_ckpt.storage.writing.partial import Partial

_CACHED_BYTES = 512 << 10
# Runs of an image are joined up to multiples of this, which fills whole writes.
_JOINED_BYTES = 4 << 20


class LeafKey(NamedTuple):
    """The name of a state and of a leaf in it."""

    state: str
    leaf: str


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The layout of one file.

    Attributes:
        header: The bytes before the first leaf.
        order: Indices of the state and of its leaf, for each leaf in file order.
        offsets: Start of each leaf in the file, without gaps between them.
        nbytes: Size of the file.
    """

    header: bytes
    order: tuple[tuple[int, int], ...]
    offsets: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardImage:
    """A copy of leaves in memory, as they will be in one file, header and all.

    Attributes:
        plan: The layout of the file.
        memory: Its bytes, at a page boundary.
    """

    plan: ShardPlan
    memory: memoryview


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's file of a generation.

    Attributes:
        file: The file.
        leaves: The leaves in it.
    """

    file: StoredFile
    leaves: Mapping[LeafKey, StoredLeaf]


def write_shard(
    partial: Partial,
    captured: Sequence[CapturedState],
    rank: int,
    image: ShardImage | None = None,
) -> Shard | None:
    """Write a rank's leaves to its file, as `write_leaf_file` does. Not collective."""
    return write_leaf_file(partial, captured, shard_file_name(rank), image)


def write_leaf_file(
    partial: Partial,
    captured: Sequence[CapturedState],
    name: str,
    image: ShardImage | None = None,
) -> Shard | None:
    """Write all leaves of some states to one durable file.

    Not collective. Leaves not digested yet are digested here, while earlier bytes are being
    written.

    Args:
        partial: The generation being written.
        captured: The states whose leaves this rank writes.
        name: Name of the file.
        image: What holds the bytes of these leaves, if nothing changes them meanwhile. It
            is written as it is, unless only some of its leaves are to be written.

    Returns:
        The file; None if there is no leaf to write.

    Raises:
        SaveError: On the calling rank.
    """
    if not any(content.leaves for content in captured):
        return None
    plan = plan_of(captured)
    digests: list[Digest] = []
    runs = _digested_runs(plan, captured, digests)
    is_kept = image is not None and image.plan is plan
    if image is not None and is_kept:
        runs = _runs_of_image(runs, image.memory)
    partial.write_shard(name, runs, plan.nbytes, kept=is_kept)
    return _describe(plan, captured, digests, name, partial.generation)


def _digested_runs(
    plan: ShardPlan, captured: Sequence[CapturedState], digests: list[Digest]
) -> Iterator[memoryview]:
    """Yield the bytes of a file; append the digest of each leaf on the way."""
    yield memoryview(plan.header)
    for state, leaf in plan.order:
        content = captured[state]
        try:
            data = content.leaves[leaf].buffer.read()
        except Exception:
            with about_leaf(content, content.leaves[leaf]):
                raise
        if content.digests:
            digests.append(content.digests[leaf])
            yield data
            continue
        # Piece by piece: each is still in the cache when it is copied or written, and the
        # disk is not idle while a large leaf is digested.
        hasher = BlockHasher(BLOCK_BYTES)
        for piece in split_blocks(data, _CACHED_BYTES):
            hasher.update(piece)
            yield piece
        digests.append(hasher.finish())


def _runs_of_image(runs: Iterator[memoryview], memory: memoryview) -> Iterator[memoryview]:
    """Yield the same bytes from an image, small runs joined."""
    start = end = 0
    for run in runs:
        end += len(run)
        reach = end // _JOINED_BYTES * _JOINED_BYTES
        if reach > start:
            yield memory[start:reach]
            start = reach
    yield memory[start:end]


def foresee_shard(
    captured: Sequence[CapturedState], rank: int, generation: int
) -> Shard | None:
    """Return the shard of another rank, as `foresee_leaf_file` does. Not collective."""
    return foresee_leaf_file(captured, shard_file_name(rank), generation)


def foresee_leaf_file(
    captured: Sequence[CapturedState], name: str, generation: int
) -> Shard | None:
    """Return the shard that `write_leaf_file` makes on another rank from digested states.

    Not collective. Thread-safe.

    Args:
        captured: States equal to those of the other rank.
        name: Name of the file.
        generation: The generation being written.
    """
    if not any(content.leaves for content in captured):
        return None
    plan = plan_of(captured)
    digests = [(captured[state].digests or ())[leaf] for state, leaf in plan.order]
    return _describe(plan, captured, digests, name, generation)


def encode_shard(captured: Sequence[CapturedState]) -> bytes:
    """Return the bytes of the file that `write_leaf_file` writes.

    Not collective. Thread-safe.

    Args:
        captured: The states whose leaves are in it.
    """
    plan = plan_of(captured)
    leaves = [captured[state].leaves[leaf].buffer.read() for state, leaf in plan.order]
    return b"".join([plan.header, *leaves])


def with_digests(captured: CapturedState, shards: Iterable[Shard]) -> CapturedState:
    """Return a state with the digests that were taken while its leaves were written.

    Not collective. Thread-safe.
    """
    if captured.digests is not None:
        return captured
    found = [
        shard.leaves[key].digest
        for spec in captured.specs
        for shard in shards
        if (key := LeafKey(captured.name, spec.name)) in shard.leaves
    ]
    return replace(captured, digests=tuple(found))


def plan_shard(states: Sequence[tuple[str, Sequence[LeafSpec]]]) -> ShardPlan:
    """Lay out the leaves of several states in one safetensors file.

    Not collective. Thread-safe. Leaves with larger elements come first, so that every leaf
    is aligned to its element size; otherwise the order is that of the states.

    Args:
        states: Name and leaves of each state.

    Raises:
        SaveError: On the calling rank, if the header would be too large to read.
    """
    order = sorted(
        (
            (state, leaf)
            for state, (_, specs) in enumerate(states)
            for leaf in range(len(specs))
        ),
        key=lambda at: -dtypes.element_bytes(states[at[0]][1][at[1]].dtype),
    )
    specs = [states[state][1][leaf] for state, leaf in order]
    # A state's name is encoded, so that "a/b" + "c" and "a" + "b/c" stay apart.
    prefixes = [quote(name, safe="") for name, _ in states]
    names = [
        f"{prefixes[state]}/{spec.name}"
        for (state, _), spec in zip(order, specs, strict=True)
    ]
    header = encode_header(zip(names, specs, strict=True), {"format": "mpi_ckpt"})
    offsets, end = [], len(header)
    for spec in specs:
        offsets.append(end)
        end += spec.nbytes
    return ShardPlan(header, tuple(order), tuple(offsets), end)


def plan_of(captured: Sequence[CapturedState]) -> ShardPlan:
    """Return the layout of the file that these leaves make; usually the previous object.

    Not collective. Thread-safe.

    Raises:
        SaveError: On the calling rank, if the header would be too large to read.
    """
    return _plan_forms(tuple((content.name, content.form) for content in captured))


@lru_cache(maxsize=4)
def _plan_forms(forms: tuple[tuple[str, Form], ...]) -> ShardPlan:
    # The forms, and so the plan, usually stay the same from save to save.
    return plan_shard([(name, form.specs) for name, form in forms])


def _describe(
    plan: ShardPlan,
    captured: Sequence[CapturedState],
    digests: Sequence[Digest],
    name: str,
    generation: int,
) -> Shard:
    forms = [(content.name, content.specs) for content in captured]
    leaves = {}
    for (number, leaf), offset, digest in zip(
        plan.order, plan.offsets, digests, strict=True
    ):
        state, specs = forms[number]
        spec = specs[leaf]
        extent = Extent(name, offset, spec.nbytes)
        leaves[LeafKey(state, spec.name)] = StoredLeaf(spec, extent, digest)
    header = digest_bytes(plan.header)
    file = StoredFile(name, plan.nbytes, len(plan.header), header, generation)
    return Shard(file, leaves)
