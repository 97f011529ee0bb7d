# SPDX-License-Identifier: Apache-2.0
"""Where arriving bytes go: straight into live memory where it is contiguous."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi_ckpt.leaf import Buffer

__all__ = ["NoBuffer", "Target"]


class NoBuffer:
    """Takes bytes that nobody wants. Not collective. Not thread-safe."""

    def view(self) -> memoryview | None:
        """Return None: there is no memory."""
        return None

    def read(self) -> memoryview:
        """Return nothing."""
        return memoryview(b"")

    def copy_to(self, target: memoryview) -> None:
        """Copy nothing."""

    def write(self, data: memoryview) -> None:
        """Forget the bytes."""

    def stamp(self) -> int:
        """Return nothing of interest."""
        return 0


class Target:
    """A buffer being filled. Not collective. Not thread-safe.

    Args:
        buffer: Where the bytes belong.
        nbytes: Their number.
    """

    def __init__(self, buffer: Buffer, nbytes: int) -> None:
        self._buffer = buffer
        self._nbytes = nbytes
        self._live: memoryview | None = buffer.view()
        self._private: bytearray | None = None

    def memory(self) -> memoryview:
        """Return the bytes to fill; a private copy is made when first needed."""
        if self._live is not None:
            return self._live
        if self._private is None:
            self._private = bytearray(self._nbytes)
        return memoryview(self._private)

    def finish(self) -> None:
        """Move a private copy to where it belongs, and drop it."""
        if self._live is None:
            self._buffer.write(self.memory())
            self._private = None
