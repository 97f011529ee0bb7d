# SPDX-License-Identifier: Apache-2.0
"""Writes one rank's leaves of a generation into one safetensors file. No MPI."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from mpi_ckpt.engine.sync.captured import about_leaf
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.buckets import are_read_together, pieces_of, plan_buckets, read_leaves
from mpi_ckpt.leaves.digest import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    BlockHasher,
    Digests,
    digest_bytes,
    split_blocks,
)
from mpi_ckpt.storage.format.layout import shard_file_name
from mpi_ckpt.storage.format.manifest import Extents, StoredFile, StoredLeaves
from mpi_ckpt.storage.format.tensorfile import encode_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.leaves.buckets import Readable
    from mpi_ckpt.leaves.leaf import Form
    from mpi_ckpt.storage.writing.partial import Partial

# Smaller leaves are joined before they are written, in buckets that stay in the cache.
_SMALL_BYTES = 32 << 10
_BUCKET_BYTES = 256 << 10
_CACHED_BYTES = 512 << 10
# Runs of an image are joined up to multiples of this, which fills whole writes.
_JOINED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The layout of one file. Leaves are counted over all states.

    Attributes:
        header: The bytes before the first leaf.
        order: The number of each leaf, in file order.
        offsets: Start of each leaf in the file, in the order of the leaves; there are no
            gaps between them.
        nbytes: Size of the file.
        buckets: The runs of leaves that are written at once: first place in file order, and
            one past the last.
    """

    header: bytes
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    nbytes: int
    buckets: Sequence[tuple[int, int]]


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
        states: The leaves in it, by the name of their state.
    """

    file: StoredFile
    states: Mapping[str, StoredLeaves]


def write_shard(
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
    leaves = _Leaves(captured, plan)
    is_kept = image is not None and image.plan is plan
    if image is not None and is_kept:
        runs = _runs_of_image(leaves.runs(image.memory), image.memory)
    else:
        runs = leaves.runs(None)
    partial.write_shard(name, runs, plan.nbytes, kept=is_kept)
    return _describe(plan, captured, leaves.digests, name, partial.generation)


class _Leaves:
    """The leaves of a file, whose bytes pass once: those not digested yet are digested."""

    def __init__(self, captured: Sequence[CapturedState], plan: ShardPlan) -> None:
        self._plan = plan
        self._homes = [content for content in captured for _ in content.leaves]
        leaves = list(chain.from_iterable(content.leaves for content in captured))
        self._leaves = [leaves[number] for number in plan.order.tolist()]
        counts = [len(content.leaves) for content in captured]
        is_known = [content.digests is not None for content in captured]
        self._is_known = np.repeat(is_known, counts)[plan.order]
        known = Digests.joined(
            content.digests or Digests(bytes(count * DIGEST_BYTES))
            for content, count in zip(captured, counts, strict=True)
        )
        self._rows, self._several = known.rows.copy(), dict(known.several)

    @property
    def digests(self) -> Digests:
        """Their digests, in the order of the states; complete once `runs` has ended."""
        return Digests(self._rows.tobytes(), self._several)

    def runs(self, image: memoryview | None) -> Iterator[memoryview]:
        """Yield the bytes of the file in order.

        Args:
            image: The whole file, if there is one: small leaves need no joining then.
        """
        yield memoryview(self._plan.header)
        end = len(self._plan.header)
        for first, last in self._plan.buckets:
            start = end
            end += sum([leaf.spec.nbytes for leaf in self._leaves[first:last]])
            is_new = ~self._is_known[first:last]
            if last - first == 1 and (is_new[0] or image is None):
                number = int(self._plan.order[first])
                pieces = self._pieces(first, number)
                yield from self._digested(number, pieces) if is_new[0] else pieces
                continue
            data = self._read(first, last)
            if is_new.any():
                found = Digests(b"".join(map(digest_bytes, data))).rows
                self._rows[self._plan.order[first:last][is_new]] = found[is_new]
            yield memoryview(b"".join(data)) if image is None else image[start:end]

    def _pieces(self, at: int, number: int) -> Iterator[memoryview]:
        """Yield the bytes of one leaf."""
        leaf = self._leaves[at]
        pieces = pieces_of(leaf)
        if pieces is None:
            yield memoryview(self._read(at, at + 1)[0])
            return
        try:
            yield from pieces
        except Exception:
            with about_leaf(self._homes[number], leaf):
                raise

    def _digested(self, number: int, runs: Iterable[memoryview]) -> Iterator[memoryview]:
        # Piece by piece: each is still in the cache when it is copied or written, and the
        # disk is not idle while a large leaf is digested.
        hasher = BlockHasher(BLOCK_BYTES)
        for run in runs:
            for piece in split_blocks(run, _CACHED_BYTES):
                hasher.update(piece)
                yield piece
        digest = hasher.finish()
        self._rows[number] = Digests(digest.whole).rows[0]
        if len(digest.blocks) > 1:
            self._several[number] = digest

    def _read(self, first: int, last: int) -> Sequence[Readable]:
        leaves = self._leaves[first:last]
        if len(leaves) > 1 and are_read_together(leaves):
            with suppress(Exception):  # read one by one, it is raised with the name
                return read_leaves(leaves)
        found = []
        for leaf, number in zip(leaves, self._plan.order[first:last].tolist(), strict=True):
            try:
                found.append(leaf.buffer.read())
            except Exception:
                with about_leaf(self._homes[number], leaf):
                    raise
        return found


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
    """Return the shard that `write_shard` makes on another rank from digested states.

    Not collective. Thread-safe.

    Args:
        captured: States equal to those of the other rank.
        name: Name of the file.
        generation: The generation being written.
    """
    if not any(content.leaves for content in captured):
        return None
    digests = Digests.joined(content.digests or Digests() for content in captured)
    return _describe(plan_of(captured), captured, digests, name, generation)


def encode_shard(captured: Sequence[CapturedState]) -> bytes:
    """Return the bytes of the file that `write_shard` writes.

    Not collective. Thread-safe.

    Args:
        captured: The states whose leaves are in it.
    """
    plan = plan_of(captured)
    # The memory of a run may serve for the next one.
    return b"".join(map(bytes, _Leaves(captured, plan).runs(None)))


def with_digests(captured: CapturedState, shards: Iterable[Shard]) -> CapturedState:
    """Return a state with the digests that were taken while its leaves were written.

    Not collective. Thread-safe.
    """
    if captured.digests is not None:
        return captured
    found = [one.states[captured.name] for one in shards if captured.name in one.states]
    return replace(captured, digests=StoredLeaves.joined(captured.form, found).digests)


def plan_shard(states: Sequence[tuple[str, Form]]) -> ShardPlan:
    """Lay out the leaves of several states in one safetensors file.

    Not collective. Thread-safe. Leaves with larger elements come first, so that every leaf
    is aligned to its element size; otherwise the order is that of the states.

    Args:
        states: Name and form of each state.

    Raises:
        SaveError: On the calling rank, if the header would be too large to read.
    """
    specs = [spec for _, form in states for spec in form.specs]
    widths = np.array([dtypes.element_bytes(spec.dtype) for spec in specs], np.int64)
    order = np.argsort(-widths, kind="stable")
    # A state's name is encoded, so that "a/b" + "c" and "a" + "b/c" stay apart.
    prefixes = [quote(name, safe="") for name, _ in states]
    names = [
        f"{prefix}/{name}"
        for prefix, (_, form) in zip(prefixes, states, strict=True)
        for name in form.names
    ]
    entries = [(names[number], specs[number]) for number in order.tolist()]
    header = encode_header(entries, {"format": "mpi_ckpt"})
    sizes = np.array([spec.nbytes for spec in specs], np.int64)[order]
    ends = len(header) + np.cumsum(sizes)
    offsets = np.empty_like(sizes)
    offsets[order] = ends - sizes
    end = int(ends[-1]) if len(ends) else len(header)
    buckets = plan_buckets(sizes, _SMALL_BYTES, _BUCKET_BYTES)
    return ShardPlan(header, order, offsets, end, buckets)


def plan_of(captured: Sequence[CapturedState]) -> ShardPlan:
    """Return the layout of the file that these leaves make; usually the previous object.

    Not collective. Thread-safe.

    Raises:
        SaveError: On the calling rank, if the header would be too large to read.
    """
    return _plan_forms(tuple((content.name, content.form) for content in captured))


@lru_cache(maxsize=16)  # a host holds several files of a local generation
def _plan_forms(forms: tuple[tuple[str, Form], ...]) -> ShardPlan:
    # The forms, and so the plan, usually stay the same from save to save.
    return plan_shard(forms)


def _describe(
    plan: ShardPlan,
    captured: Sequence[CapturedState],
    digests: Digests,
    name: str,
    generation: int,
) -> Shard:
    ends = accumulate((len(content.leaves) for content in captured), initial=0)
    states = {}
    for content, (first, last) in zip(captured, pairwise(ends), strict=True):
        if last > first:
            file, offsets = np.zeros(last - first, np.int64), plan.offsets[first:last]
            extents = Extents((name,), file, offsets, content.form.sizes)
            of_state = digests if last - first == len(digests) else digests[first:last]
            states[content.name] = StoredLeaves(content.form, extents, of_state)
    return Shard(foresee_file(plan, name, generation), states)


def foresee_file(plan: ShardPlan, name: str, generation: int) -> StoredFile:
    """Return the entry of a file in the manifest. Not collective. Thread-safe.

    Args:
        plan: Its layout.
        name: Its name.
        generation: The generation being written.
    """
    header = digest_bytes(plan.header)
    return StoredFile(name, plan.nbytes, len(plan.header), header, generation)
