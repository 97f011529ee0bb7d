# SPDX-License-Identifier: Apache-2.0
"""Serves a disk from memory through FUSE, and logs what is done to it.

Arguments: where to mount it, a file with the first contents, a file for the log, a path:
while there is a file of that name, writes and flushes fail with EIO; the seconds after
which this ends, whatever happens: all calls that wait for it then fail.

Where it is mounted: ``disk``, and ``acknowledged``: a number written to it goes into the
log, in order with the writes. It serves one call at a time, so that there is an order.
"""

import errno
import signal
import stat
import sys
from pathlib import Path

from fuse import FUSE, FuseOSError, Operations

from tests.crash.block_log import ACKNOWLEDGED, FLUSH, WRITE, Record


class LoggedDisk(Operations):
    """A directory of two files."""

    def __init__(self, contents: Path, log: Path, fail: Path) -> None:
        self._disk = bytearray(contents.read_bytes())
        self._log = log.open("wb", buffering=0)
        self._fail = fail

    def getattr(self, path, fh=None):
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
        if path not in ("/disk", "/acknowledged"):
            raise FuseOSError(errno.ENOENT)
        size = len(self._disk) if path == "/disk" else 0
        return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": size}

    def readdir(self, path, fh):
        return [".", "..", "disk", "acknowledged"]

    def read(self, path, size, offset, fh):
        return bytes(self._disk[offset : offset + size]) if path == "/disk" else b""

    def write(self, path, data, offset, fh):
        if path == "/acknowledged":
            self._log.write(Record(ACKNOWLEDGED, int(data)).encoded())
        else:
            self._fail_if_asked()
            self._log.write(Record(WRITE, offset, data).encoded())
            self._disk[offset : offset + len(data)] = data
        return len(data)

    def fsync(self, path, datasync, fh):
        self._fail_if_asked()
        self._log.write(Record(FLUSH).encoded())
        return 0

    def _fail_if_asked(self) -> None:
        if self._fail.exists():
            raise FuseOSError(errno.EIO)


def main() -> None:
    where, contents, log, fail, seconds = sys.argv[1:]
    signal.alarm(int(seconds))
    disk = LoggedDisk(Path(contents), Path(log), Path(fail))
    FUSE(disk, where, foreground=True, nothreads=True)


if __name__ == "__main__":
    main()
