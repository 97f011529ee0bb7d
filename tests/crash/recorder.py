# SPDX-License-Identifier: Apache-2.0
"""Stands in for ``os`` in the module ``filesystem``: does it, and writes it down.

``filesystem`` is the one module that changes a file system, and it does so through ``os``
alone, so what is recorded here is all that a save, a restore or a sweep does to a disk.
Only root writes, so the number of ranks does not change it (test_crash_states shows this).

Reads and hints pass through; writes may come from several threads. A call this module
does not know fails the test: teach it here and in ``replay`` before the library may use it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.storage import filesystem
from tests.directories import LOSSY

if TYPE_CHECKING:
    from pathlib import Path

_READS = frozenset(
    {
        "close",
        "fstat",
        "geteuid",
        "listdir",
        "lstat",
        "path",
        "posix_fadvise",
        "preadv",
        "statvfs",
        "strerror",
    }
)
_serials = itertools.count(1)


@dataclass(frozen=True)
class Op:
    """One change, its paths relative to the sandbox.

    Attributes:
        kind: mkdir, create, pwrite, extend, cut, sync_file, sync_dir, rename, link, unlink,
            rmdir; or mark, which is no change: what the program knew at that moment.
        path: What it was done to; for pwrite and sync_file the name the file was made
            under, for information.
        target: The new name, for rename and link.
        file: Number of the open file that it was done to, which stands for the inode.
        offset: Where bytes went; the length, for extend and cut.
        data: The bytes.
        note: What a mark says.
    """

    kind: str
    path: str = ""
    target: str = ""
    file: int = 0
    offset: int = 0
    data: bytes = b""
    note: Any = None

    def __str__(self) -> str:
        extra = f" -> {self.target}" if self.target else ""
        extra += f" [{self.offset}+{len(self.data)}]" if self.data else ""
        extra += f" {self.note}" if self.note is not None else ""
        return f"{self.kind} {self.path}{extra}"


def to_json(ops: list[Op]) -> str:
    """Return operations as text, so that a rank can hand them to the test."""
    return json.dumps([{**asdict(op), "data": op.data.hex()} for op in ops])


def from_json(text: str) -> list[Op]:
    """Read what `to_json` wrote."""
    return [
        Op(**{**record, "data": bytes.fromhex(record["data"])})
        for record in json.loads(text)
    ]


def merge(records: list[tuple[list[int], str]]) -> list[Op]:
    """Put what several ranks of one host recorded in the order in which it was done.

    Operations of two ranks that depend on one another are apart in time, as a message
    lies between them.
    """
    timed = []
    for rank, (times, text) in enumerate(records):
        latest = 0
        for at, op in zip(times, from_json(text), strict=True):
            latest = max(latest, at)  # threads of a rank may note out of step
            # Files of two ranks have the same numbers.
            serial = op.file and op.file * len(records) + rank
            timed.append((latest, rank, len(timed), replace(op, file=serial)))
    return [op for _, _, _, op in sorted(timed, key=lambda timing: timing[:3])]


class Recorder:
    """An ``os`` that records; everything below ``sandbox`` is in the record."""

    def __init__(self, sandbox: Path) -> None:
        self.ops: list[Op] = []
        self.times: list[int] = []
        self._sandbox = os.path.realpath(sandbox)
        # Descriptor -> path and number of the file, 0 for a directory.
        self._open: dict[int, tuple[str, int]] = {}

    def __getattr__(self, name: str) -> Any:
        if name in _READS or name.isupper() or name.startswith("O_"):
            return getattr(os, name)
        raise AssertionError(f"the recorder does not know os.{name}: teach it first")

    def mark(self, note: Any) -> None:
        """Note what the program knows after all that was recorded so far."""
        self._note(Op("mark", note=note))

    def _note(self, op: Op) -> None:
        self.ops.append(op)
        self.times.append(time.monotonic_ns())

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if os.path.basename(path) in LOSSY:
            descriptor = os.open(path, flags, mode)
            self._open.pop(descriptor, None)
            return descriptor
        writing = flags & (os.O_WRONLY | os.O_RDWR)
        if writing and not (flags & os.O_CREAT and flags & os.O_EXCL):
            raise AssertionError(f"{path} is opened for writing, though it may exist")
        try:
            descriptor = os.open(path, flags, mode)
        except OSError:
            # Linux makes a file before it refuses to open it for direct writes.
            if flags & os.O_CREAT and flags & os.O_DIRECT and os.path.exists(path):
                self._note(Op("create", self._relative(path), file=next(_serials)))
            raise
        if flags & os.O_CREAT:
            serial = next(_serials)
            self._note(Op("create", self._relative(path), file=serial))
            self._open[descriptor] = (self._relative(path), serial)
        elif stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self._open[descriptor] = (self._relative(path), 0)
        else:
            self._open.pop(descriptor, None)
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        assert descriptor not in self._open, "only lossy files are appended to"
        return os.write(descriptor, data)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        count = os.pwrite(descriptor, data, offset)
        if descriptor not in self._open:  # a lossy file
            return count
        path, serial = self._open[descriptor]
        written = bytes(memoryview(data).cast("B")[:count])
        self._note(Op("pwrite", path, file=serial, offset=offset, data=written))
        return count

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        os.posix_fallocate(descriptor, offset, length)
        path, serial = self._open[descriptor]
        self._note(Op("extend", path, file=serial, offset=offset + length))

    def ftruncate(self, descriptor: int, length: int) -> None:
        os.ftruncate(descriptor, length)
        path, serial = self._open[descriptor]
        self._note(Op("cut", path, file=serial, offset=length))

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        path, serial = self._open[descriptor]
        self._note(Op("sync_file" if serial else "sync_dir", path, file=serial))

    def mkdir(self, path: Any, mode: int = 0o777) -> None:
        os.mkdir(path, mode)
        self._note(Op("mkdir", self._relative(path)))

    def rename(self, source: Any, target: Any) -> None:
        os.rename(source, target)
        self._note(Op("rename", self._relative(source), self._relative(target)))

    def link(self, source: Any, target: Any, *, follow_symlinks: bool = True) -> None:
        os.link(source, target, follow_symlinks=follow_symlinks)
        self._note(Op("link", self._relative(source), self._relative(target)))

    def unlink(self, path: Any) -> None:
        os.unlink(path)
        self._note(Op("unlink", self._relative(path)))

    def rmdir(self, path: Any) -> None:
        os.rmdir(path)
        self._note(Op("rmdir", self._relative(path)))

    def _relative(self, path: Any) -> str:
        return os.path.relpath(os.path.abspath(path), self._sandbox)


@contextlib.contextmanager
def in_place_of_os(stand_in: Any):
    """Put something in place of the ``os`` that the library's one writer uses."""
    real = filesystem.os
    filesystem.os = stand_in  # type: ignore[misc]
    try:
        yield stand_in
    finally:
        filesystem.os = real  # type: ignore[misc]
