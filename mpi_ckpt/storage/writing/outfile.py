# SPDX-License-Identifier: Apache-2.0
"""Writes a file from front to back, bypassing the page cache unless it is small.

Direct writes need aligned memory, offsets and lengths, so bytes are copied into aligned
blocks; while one block is being written, the next is filled. The copy costs a tenth of the
page cache's cost, which also copies and then competes with the device for memory. Bytes
that stay unchanged, and lie in memory as they will in the file, are written from there.
"""

from __future__ import annotations

import errno
import io
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from mpi_ckpt.errors import WriteError
from mpi_ckpt.leaves.digest import BlockHasher, Digest, digest_bytes
from mpi_ckpt.memory import round_up
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.format.manifest import StoredFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from _typeshed import ReadableBuffer, WriteableBuffer

    from mpi_ckpt.leaves.digest import Digest
    from mpi_ckpt.memory import Arena
    from mpi_ckpt.storage.format.tile_table import TileFilePlan
    from mpi_ckpt.storage.writing.partial import Partial


IOMode = Literal["auto", "direct", "buffered"]

_ALIGNMENT = 4096
# Each block is handed to a thread, so there are few. Length and number were measured
# together, beside three of 4 MiB: benchmarks/README.md, "Save".
_BLOCK_BYTES = 8 << 20
# Two writes keep a disk busy, more only take cores from the training.
_IN_FLIGHT = 2
# Two writes often end together: then one more block is full, and another is being filled.
_BLOCKS = _IN_FLIGHT + 2
# So many writes of kept bytes may wait for a thread: none of them holds a block.
_KEPT_WAITING = 2 * _IN_FLIGHT
# Below this size a direct write waits for the disk; the page cache would not.
_DIRECT_BYTES_MIN = 8 << 20
_WRITE_BACK_BYTES = 32 << 20
# Fewer bytes are copied before NumPy has made an array of them.
_SMALL_BYTES = 32 << 10


class OutFile(Protocol):
    """The result of `create_out_file`. Not collective."""

    def write(self, data: memoryview) -> None:
        """Append bytes, which may change as soon as this returns."""

    def write_kept(self, data: memoryview) -> None:
        """Append bytes that stay unchanged until `settle` or `finish` returns."""

    def settle(self) -> int:
        """Write all bytes to the file, and release it: nothing is appended afterwards.

        Returns:
            Its descriptor, through the page cache: the caller may now write any range.
        """

    def finish(self) -> None:
        """Make the whole file durable. Called once, last."""


@contextmanager
def create_out_file(
    path: Path, *, nbytes: int | None, mode: IOMode, staging: Arena
) -> Iterator[OutFile]:
    """Create a file that must not exist; close it afterwards.

    Not collective.

    Args:
        path: The file.
        nbytes: Its size in bytes, if known.
        mode: ``"auto"`` writes direct if the file system supports it and the file is not
            small; ``"direct"`` fails if it does not.
        staging: Memory for direct writes.

    Raises:
        OSError: On the calling rank.
    """
    small = nbytes is not None and nbytes < _DIRECT_BYTES_MIN
    with ExitStack() as stack:
        if mode == "direct" or (mode == "auto" and not small):
            descriptor = _create_direct(path, stack, insist=mode == "direct")
            if descriptor is not None:
                if nbytes:
                    _reserve(descriptor, path, nbytes)
                # Ends before the file is closed: no write is pending then.
                pool = ThreadPoolExecutor(_IN_FLIGHT, "mpi_ckpt-write")
                stack.enter_context(pool)
                memory = staging.take(_BLOCKS * _BLOCK_BYTES)
                yield _DirectFile(descriptor, memory, pool, insist=mode == "direct")
                return
        yield _BufferedFile(stack.enter_context(filesystem.create_file(path)))


def _create_direct(path: Path, stack: ExitStack, *, insist: bool) -> int | None:
    try:
        return stack.enter_context(filesystem.create_file(path, direct=True))
    except OSError as error:
        if insist or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        # Linux creates the file before it refuses to open it direct.
        filesystem.remove_file(path)
        return None


def _reserve(descriptor: int, path: Path, nbytes: int) -> None:
    # The only place where a quota shows before anything is written: report the size.
    with os_errors_as(WriteError, f"reserving {nbytes:,} bytes for", path):
        filesystem.reserve(descriptor, nbytes)


class _BufferedFile:
    """Writes through the page cache, and asks it to write out as it fills."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._offset = 0
        self._written_back = 0

    def write(self, data: memoryview) -> None:
        filesystem.write_all(self._descriptor, data, self._offset)
        self._offset += len(data)
        waiting = self._offset - self._written_back
        if waiting >= _WRITE_BACK_BYTES:
            filesystem.start_writeback(self._descriptor, self._written_back, waiting)
            self._written_back = self._offset

    def write_kept(self, data: memoryview) -> None:
        self.write(data)

    def settle(self) -> int:
        return self._descriptor

    def finish(self) -> None:
        filesystem.sync_file(self._descriptor)


class _DirectFile:
    """Fills one aligned block while others are being written."""

    def __init__(
        self,
        descriptor: int,
        memory: memoryview,
        pool: ThreadPoolExecutor,
        *,
        insist: bool,
    ) -> None:
        self._descriptor = descriptor
        self._insist = insist
        starts = range(0, _BLOCKS * _BLOCK_BYTES, _BLOCK_BYTES)
        self._views = [memory[start : start + _BLOCK_BYTES] for start in starts]
        self._blocks = [np.frombuffer(view, np.uint8) for view in self._views]
        self._pool = pool
        self._pending: list[Future[None] | None] = [None] * _BLOCKS
        self._kept: deque[Future[None]] = deque()
        self._current = 0
        self._filled = 0
        self._offset = 0
        self._settled = False

    def write(self, data: memoryview) -> None:
        end = self._filled + len(data)
        if self._filled > 0 and end < _BLOCK_BYTES and len(data) < _SMALL_BYTES:
            self._views[self._current][self._filled : end] = data
            self._filled = end
            return
        source = np.frombuffer(data, np.uint8)
        while len(source):
            if self._filled == 0:
                self._await(self._current)
            room = self._blocks[self._current][self._filled :]
            count = min(len(room), len(source))
            np.copyto(room[:count], source[:count])  # lets other threads run
            self._filled += count
            source = source[count:]
            if self._filled == _BLOCK_BYTES:
                self._submit(_BLOCK_BYTES)

    def write_kept(self, data: memoryview) -> None:
        source = np.frombuffer(data, np.uint8)
        # The bytes up to the next sector of the file, which others may have begun.
        first = -(self._offset + self._filled) % _ALIGNMENT
        end = first + (len(source) - first) // _ALIGNMENT * _ALIGNMENT
        if end <= first or (source.ctypes.data + first) % _ALIGNMENT:
            self.write(data)
            return
        self.write(data[:first])
        if self._filled:
            self._submit(self._filled)
        for start in range(first, end, _BLOCK_BYTES):
            piece = data[start : min(start + _BLOCK_BYTES, end)]
            if len(self._kept) == _KEPT_WAITING:
                self._kept.popleft().result()
            self._kept.append(self._pool.submit(self._write_block, piece, self._offset))
            self._offset += len(piece)
        self.write(data[end:])

    def settle(self) -> int:
        self._flush()
        filesystem.leave_direct(self._descriptor)
        self._settled = True
        return self._descriptor

    def finish(self) -> None:
        if not self._settled:
            self._flush()
        filesystem.sync_file(self._descriptor)

    def _flush(self) -> None:
        length = self._offset + self._filled
        if self._filled:
            padded = round_up(self._filled, _ALIGNMENT)
            self._blocks[self._current][self._filled : padded] = 0
            self._submit(padded)
        for index in range(len(self._pending)):
            self._await(index)
        while self._kept:
            self._kept.popleft().result()
        filesystem.set_length(self._descriptor, length)

    def _submit(self, nbytes: int) -> None:
        block = self._blocks[self._current][:nbytes].data
        self._pending[self._current] = self._pool.submit(
            self._write_block, block, self._offset
        )
        self._offset += nbytes
        self._filled = 0
        self._current = (self._current + 1) % len(self._blocks)

    def _write_block(self, block: memoryview, offset: int) -> None:
        try:
            filesystem.write_all(self._descriptor, block, offset)
        except OSError as error:
            # Opened direct, but a direct write fails: a file system of larger sectors.
            if self._insist or error.errno != errno.EINVAL:
                raise
            filesystem.leave_direct(self._descriptor)
            filesystem.write_all(self._descriptor, block, offset)

    def _await(self, index: int) -> None:
        future, self._pending[index] = self._pending[index], None
        if future is not None:
            future.result()


def write_tile_file(
    partial: Partial,
    name: str,
    plan: TileFilePlan,
    tiles: Iterable[Iterable[memoryview]],
    *,
    kept: bool = False,
) -> tuple[StoredFile, list[Digest]]:
    """Write tiles as one durable file, and digest them on their way.

    Not collective.

    Args:
        partial: The generation being written.
        name: Name of the file.
        plan: Its layout.
        tiles: The bytes of each tile, in file order, as runs; each run is used up before
            the next is requested.
        kept: Whether the bytes of all runs stay unchanged until this returns.

    Returns:
        The file, as the manifest lists it, and the digests of the tiles in file order.

    Raises:
        WriteError: On the calling rank; the partial must then be dropped.
    """
    digests: list[Digest] = []
    headers: list[bytes] = []

    def runs() -> Iterator[memoryview]:
        for tile in tiles:
            hasher = BlockHasher(plan.block_bytes)
            # Run by run: otherwise the disk would be idle while a large tile is digested.
            for run in tile:
                hasher.update(run)
                yield run
            digests.append(hasher.finish())

    def header() -> bytes:
        headers.append(plan.encode(digests))
        return headers[0]

    partial.write_headed(name, plan.header_bytes, runs(), header, plan.nbytes, kept=kept)
    digest = digest_bytes(headers[0])
    file = StoredFile(name, plan.nbytes, plan.header_bytes, digest, partial.generation)
    return file, digests


_READ_BYTES = 4 << 20


class OutStream(io.RawIOBase):
    """A raw file object over a file that is being created.

    Not collective. Used by one thread.

    Args:
        path: The file.
        out: The open file, still empty.

    Attributes:
        nbytes: Length of the file in bytes.
    """

    def __init__(self, path: Path, out: OutFile) -> None:
        super().__init__()
        self._path = path
        self._out = out
        self._hasher: BlockHasher | None = BlockHasher()
        self._position = 0
        self._writer = -1
        self._reader: int | None = None
        self._readers = ExitStack()
        self.nbytes = 0

    def writable(self) -> bool:
        """Return True: the stream can be written."""
        return True

    def readable(self) -> bool:
        """Return True: written bytes can be read."""
        return True

    def seekable(self) -> bool:
        """Return True: the stream can be written in any order."""
        return True

    def tell(self) -> int:
        """Return the position, in bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position, also past the end."""
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise ValueError(f"seek() from {whence!r}")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.nbytes}
        if start[whence] + offset < 0:
            raise ValueError(f"seek() to {start[whence] + offset}, before the start")
        self._position = start[whence] + offset
        return self._position

    def write(self, data: ReadableBuffer) -> int:
        """Write bytes at the position."""
        view = memoryview(data).cast("B")
        if self._hasher is not None and self._position == self.nbytes:
            self._out.write(view)
            self._hasher.update(view)
        else:
            self._settle()
            filesystem.write_all(self._writer, view, self._position)
        self._position += len(view)
        self.nbytes = max(self.nbytes, self._position)
        return len(view)

    def readinto(self, into: WriteableBuffer) -> int:
        """Read bytes from the position on."""
        view = memoryview(into).cast("B")
        if self._position >= self.nbytes or not view:
            return 0
        self._settle()
        if self._reader is None:
            opened = filesystem.open_for_reading(self._path)
            self._reader, _ = self._readers.enter_context(opened)
        count = filesystem.read_at(self._reader, view, self._position)
        self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        """Cut the file, or lengthen it by zeros, to the position or a given size."""
        size = self._position if size is None else size
        if size != self.nbytes:
            self._settle()
            filesystem.set_length(self._writer, size)
            self.nbytes = size
        return size

    def finish(self) -> Digest:
        """Make the file durable, and return the digest of its contents.

        Called once, last; also if the writer has closed the stream.
        """
        self._out.finish()
        if self._hasher is not None:
            return self._hasher.finish()
        hasher, window = BlockHasher(), memoryview(bytearray(_READ_BYTES))
        with filesystem.open_for_reading(self._path) as (reader, _):
            while count := filesystem.read_at(reader, window, hasher.nbytes):
                hasher.update(window[:count])
        return hasher.finish()

    def close(self) -> None:
        """Accept no more calls; the file itself stays unchanged."""
        self._readers.close()
        super().close()

    def _settle(self) -> None:
        """Stop writing from front to back: write all bytes, to allow any order."""
        if self._hasher is not None:
            self._writer = self._out.settle()
            self._hasher = None
