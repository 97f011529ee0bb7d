# SPDX-License-Identifier: Apache-2.0
"""Gives a plain state a file object, which can read and seek like any file.

As long as the state writes from front to back, the bytes are digested as they pass. If it
seeks, as HDF5 and MATLAB's format do, writes continue through the page cache, and the
finished file is read once more for its digest.
"""

from __future__ import annotations

import io
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mpi_ckpt.leaves.digest import BlockHasher
from mpi_ckpt.storage import filesystem

if TYPE_CHECKING:
    from pathlib import Path

    from _typeshed import ReadableBuffer, WriteableBuffer

    from mpi_ckpt.leaves.digest import Digest
    from mpi_ckpt.storage.writing.outfile import OutFile

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
