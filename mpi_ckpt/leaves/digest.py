# SPDX-License-Identifier: Apache-2.0
"""Computes the digest of a run of bytes: xxh3-128, a block at a time.

Each save takes it once and uses it three times: to agree that replicas are equal, to find
what changed, and to prove the bytes on load. Blocks let a reader verify while it streams,
and show where in a large leaf a byte has flipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar, overload

import numpy as np
import xxhash

from mpi_ckpt.leaves.buckets import plan_buckets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from mpi_ckpt.leaves.buckets import Readable

Item = TypeVar("Item")
Result = TypeVar("Result")

__all__ = [
    "ALGORITHM",
    "BLOCK_BYTES",
    "DIGEST_BYTES",
    "BlockHasher",
    "Digest",
    "Digests",
    "copy_many",
    "digest_bytes",
    "digest_many",
    "split_blocks",
]

ALGORITHM = "xxh3-128"
DIGEST_BYTES = 16
BLOCK_BYTES = 16 << 20

# Below this many bytes, starting threads costs more than it saves (13 GB/s a core).
_PARALLEL_BYTES = 32 << 20
# Handing a run to a thread costs what hashing half a megabyte does; smaller runs are hashed
# by the thousand, in a loop that is not Python's and does not let other threads run.
_SMALL_BYTES = 512 << 10
_GROUP_BYTES = 4 << 20
# A copy of so many bytes, and its source, are still in the cache of a core afterwards.
_CACHED_BYTES = 256 << 10


# The function itself, without one of Python around it: small leaves come by the thousand.
digest_bytes: Callable[[Readable], bytes] = xxhash.xxh3_128_digest
"""Returns the xxh3-128 of one run of bytes, 16 bytes, big end first. Thread-safe."""


@dataclass(frozen=True, slots=True)
class Digest:
    """Digest of a run of bytes.

    Attributes:
        blocks: One xxh3-128 for each block of ``BLOCK_BYTES`` (the last may be shorter);
            an empty run has one block, the digest of nothing.
    """

    blocks: tuple[bytes, ...]

    @property
    def whole(self) -> bytes:
        """The digest of the only block, or the digest of all blocks' digests in a row."""
        return (
            self.blocks[0] if len(self.blocks) == 1 else digest_bytes(b"".join(self.blocks))
        )

    @classmethod
    def of(cls, data: memoryview | bytes, block_bytes: int = BLOCK_BYTES) -> Digest:
        """Digest a run of bytes. Not collective. Thread-safe."""
        if memoryview(data).nbytes <= block_bytes:  # as for most leaves
            return cls((digest_bytes(data),))
        return cls(tuple(digest_bytes(piece) for piece in split_blocks(data, block_bytes)))


def split_blocks(data: memoryview | bytes, block_bytes: int) -> list[memoryview]:
    """Cut a run of bytes into its blocks; an empty run is one empty block. Thread-safe."""
    view = memoryview(data).cast("B")
    return [
        view[start : start + block_bytes]
        for start in range(0, max(len(view), 1), block_bytes)
    ]


class BlockHasher:
    """Digest of bytes that come as a stream. Not thread-safe."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._blocks: list[bytes] = []
        self._hash = xxhash.xxh3_128()
        self._filled = 0
        self.nbytes = 0

    def update(self, data: memoryview | bytes) -> None:
        """Add more bytes. Not collective."""
        view = memoryview(data).cast("B")
        self.nbytes += len(view)
        while len(view) > 0:
            # A full block is closed only when more bytes follow: a run that ends at the end
            # of a block gets no empty block after it.
            if self._filled == self._block_bytes:
                self._close_block()
            piece = view[: self._block_bytes - self._filled]
            self._hash.update(piece)
            self._filled += len(piece)
            view = view[len(piece) :]

    def starts(self, blocks: Sequence[bytes]) -> bool:
        """Return whether the blocks closed so far are the first of others.

        Not collective.
        """
        return self._blocks == list(blocks[: len(self._blocks)])

    def finish(self) -> Digest:
        """Return the digest of all bytes added. Not collective."""
        self._close_block()
        return Digest(tuple(self._blocks))

    def _close_block(self) -> None:
        self._blocks.append(self._hash.digest())
        self._hash = xxhash.xxh3_128()
        self._filled = 0


@dataclass(frozen=True, slots=True)
class Digests(Sequence[Digest]):
    """The digests of many runs of bytes, in order, as one run of bytes.

    Attributes:
        wholes: The `whole` of each, in a row.
        several: Index -> digest, of the runs of more than one block.
    """

    wholes: bytes = b""
    several: Mapping[int, Digest] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, digests: Iterable[Digest]) -> Digests:
        """Join digests. Not collective. Thread-safe."""
        digests = list(digests)
        several = {n: one for n, one in enumerate(digests) if len(one.blocks) != 1}
        return cls(b"".join([one.whole for one in digests]), several)

    @classmethod
    def joined(cls, parts: Iterable[Digests]) -> Digests:
        """Join several lists of digests. Not collective. Thread-safe."""
        wholes: list[bytes] = []
        several: dict[int, Digest] = {}
        count = 0
        for part in parts:
            wholes.append(part.wholes)
            several |= {count + number: one for number, one in part.several.items()}
            count += len(part)
        return cls(b"".join(wholes), several)

    @property
    def rows(self) -> NDArray[np.uint64]:
        """The `whole` of each as a row of two numbers, for comparisons."""
        return np.frombuffer(self.wholes, np.uint64).reshape(-1, 2)

    def pick(self, numbers: Sequence[int] | NDArray[np.int64]) -> Digests:
        """Return some of them. Not collective. Thread-safe."""
        several: dict[int, Digest] = {}
        if self.several:
            picked = enumerate(np.asarray(numbers, np.int64).tolist())
            several = {at: self.several[n] for at, n in picked if n in self.several}
        return Digests(self.rows[np.asarray(numbers, np.int64)].tobytes(), several)

    def __iter__(self) -> Iterator[Digest]:
        for number, at in enumerate(range(0, len(self.wholes), DIGEST_BYTES)):
            several = self.several.get(number)
            yield several or Digest((self.wholes[at : at + DIGEST_BYTES],))

    def __len__(self) -> int:
        return len(self.wholes) // DIGEST_BYTES

    @overload
    def __getitem__(self, index: int) -> Digest: ...

    @overload
    def __getitem__(self, index: slice) -> Digests: ...

    def __getitem__(self, index: int | slice) -> Digest | Digests:
        if isinstance(index, slice):
            return self.pick(range(*index.indices(len(self))))
        number = range(len(self))[index]
        if number in self.several:
            return self.several[number]
        start = number * DIGEST_BYTES
        return Digest((self.wholes[start : start + DIGEST_BYTES],))


def digest_many(
    read: Callable[[int, int], Sequence[Readable]],
    sizes: NDArray[np.int64],
    threads: int,
    block_bytes: int = BLOCK_BYTES,
    *,
    pieces_of: Callable[[int], Iterator[memoryview] | None] | None = None,
) -> Digests:
    """Digest several runs of bytes, the large ones in parallel where that is faster.

    Not collective. Thread-safe. The worker threads end before this returns.

    Args:
        read: Returns the bytes of the runs from one index to another. At most ``threads``
            results are held at a time, which bounds the memory of private copies.
        sizes: Length of each in bytes.
        threads: Threads to use at most.
        block_bytes: Block length in bytes.
        pieces_of: Returns the bytes of one run, for a large one, piece by piece; None if
            ``read`` is to return them.

    Returns:
        One digest for each run, in order.
    """
    several: dict[int, Digest] = {}

    def digest(group: tuple[int, int]) -> bytes:
        first, last = group
        pieces = pieces_of(first) if pieces_of and last - first == 1 else None
        if pieces is None and (last - first > 1 or sizes[first] <= block_bytes):
            return b"".join(map(xxhash.xxh3_128_digest, read(first, last)))
        if pieces is None:
            (data,) = read(first, last)
            found = Digest.of(memoryview(data), block_bytes)
        else:
            found = _digest_pieces(pieces, block_bytes)
        if len(found.blocks) > 1:
            several[first] = found
        return found.whole

    groups = plan_buckets(sizes, min(_SMALL_BYTES, block_bytes), _GROUP_BYTES)
    large = [group for group in groups if group[1] - group[0] == 1]
    if threads == 1 or sum(int(sizes[first]) for first, _ in large) < _PARALLEL_BYTES:
        digests = [digest(group) for group in groups]
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="mpi_ckpt-digest") as pool:
            of_large = pool.map(digest, large)
            small = {group: digest(group) for group in groups if group[1] - group[0] > 1}
            of_all = {**small, **dict(zip(large, of_large, strict=True))}
        digests = [of_all[group] for group in groups]
    return Digests(b"".join(digests), several)


def _digest_pieces(pieces: Iterator[memoryview], block_bytes: int) -> Digest:
    hasher = BlockHasher(block_bytes)
    for piece in pieces:
        hasher.update(piece)
    return hasher.finish()


def copy_many(
    copies: Sequence[tuple[memoryview, memoryview]], threads: int, *, digested: bool
) -> list[Digest]:
    """Copy several runs of bytes, and digest the copies in the same pass.

    Not collective. Thread-safe. The worker threads end before this returns.

    Args:
        copies: Source and place of each run, as long as one another.
        threads: Threads to use at most.
        digested: Whether to digest at all.

    Returns:
        One digest for each run, in order; none if none was wanted.
    """

    def copy(group: Sequence[tuple[memoryview, memoryview]]) -> list[bytes]:
        return [_copy_block(*block, digested=digested) for block in group]

    split = [
        list(
            zip(
                split_blocks(source, BLOCK_BYTES),
                split_blocks(place, BLOCK_BYTES),
                strict=True,
            )
        )
        for source, place in copies
    ]
    blocks = [block for of_run in split for block in of_run]
    if threads == 1 or sum(len(source) for source, _ in blocks) < _PARALLEL_BYTES:
        done = copy(blocks)
    else:
        done = _in_groups(copy, ((block, len(block[0])) for block in blocks), threads)
    if not digested:
        return []
    found = iter(done)
    return [Digest(tuple([next(found) for _ in of_run])) for of_run in split]


def _copy_block(source: memoryview, place: memoryview, *, digested: bool) -> bytes:
    """Copy at most a block; return the digest of the copy, or nothing."""
    if not len(source):
        return digest_bytes(b"")
    origin, target = np.frombuffer(source, np.uint8), np.frombuffer(place, np.uint8)
    if not digested:
        np.copyto(target, origin)
        return b""
    if len(source) <= _CACHED_BYTES:
        np.copyto(target, origin)
        return digest_bytes(place)
    hasher = xxhash.xxh3_128()
    for start in range(0, len(source), _CACHED_BYTES):
        piece = slice(start, start + _CACHED_BYTES)
        np.copyto(target[piece], origin[piece])
        hasher.update(place[piece])
    return hasher.digest()


def _in_groups(
    work: Callable[[Sequence[Item]], list[Result]],
    items: Iterable[tuple[Item, int]],
    threads: int,
) -> list[Result]:
    """Work on items, given with their bytes, in parallel; return all results in order."""
    # Handing one leaf to a thread costs what hashing half a megabyte does.
    groups: list[list[Item]] = []
    filled = _GROUP_BYTES
    for item, size in items:
        if filled >= _GROUP_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    with ThreadPoolExecutor(threads, thread_name_prefix="mpi_ckpt-digest") as pool:
        return [result for group in pool.map(work, groups) for result in group]
