# SPDX-License-Identifier: Apache-2.0
"""Serves a directory through FUSE as a file system that lacks something, or lies.

Arguments: where to mount it, the directory that holds what is in it, the directory of the
switches, ``kernel`` or ``server`` (who keeps the locks of flock), the seconds after which
this ends, whatever happens: all calls that wait for it then fail.

A switch is a file of JSON, looked at on every call; `tests.odd_disk` says what there is.
It serves one call at a time, so that the order in which calls fail is certain. What has
failed once on purpose is noted in the file ``fired`` beside the switches.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mfusepy import FUSE, Operations, fuse_config

_STATUS = ("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size")
_TIMES = ("st_atime", "st_mtime", "st_ctime")
_REMEMBERED = 100
"""So many older listings of a directory are known."""


def refuse(name: str) -> None:
    """Fail the call with the error of this name."""
    code = getattr(errno, name)
    raise OSError(code, os.strerror(code))


class Turn:
    """A fault of the Nth call of a kind, once or some times."""

    def __init__(self, how: dict[str, Any]) -> None:
        self.how = how
        self._at, self._times = how.get("at", 1), how.get("times", 1)
        self._number = 0

    def has_come(self) -> bool:
        """Count a call; return whether it is to fail."""
        self._number += 1
        return self._at <= self._number < self._at + self._times


class Switches:
    """What the file system does not do, or does wrong, at the moment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turns: dict[str, tuple[tuple[int, int], Turn]] = {}

    def get(self, name: str) -> Any:
        """Return what a switch says; None if it is off."""
        try:
            return json.loads((self._folder / name).read_bytes())
        except FileNotFoundError:
            return None

    def turn(self, name: str, real: str) -> dict[str, Any] | None:
        """Return how this call is to fail, if its turn has come; count it."""
        try:
            status = (self._folder / name).stat()
        except FileNotFoundError:
            return None
        version = (status.st_ino, status.st_mtime_ns)
        if name not in self._turns or self._turns[name][0] != version:
            self._turns[name] = (version, Turn(self.get(name)))
        turn = self._turns[name][1]
        wanted = turn.how.get("name")
        if wanted not in (None, os.path.basename(real)) or not turn.has_come():
            return None
        with (self._folder / "fired").open("a") as file:
            file.write(f"{name} {turn.how['lie']} {os.path.basename(real)}\n")
        return turn.how


class OddDisk(Operations):
    """Passes every call on to a directory, unless a switch says otherwise."""

    use_ns = True

    def __init__(self, backing: Path, switches: Switches) -> None:
        self._backing = str(backing)
        self._switches = switches
        # What was listed before each change of a directory, the newest last.
        self._older: dict[str, list[list[str]]] = {}
        self._lies: dict[int, dict[str, Any]] = {}
        # Names of links whose answer, the first look at them, says that they are files.
        self._posing: dict[str, str] = {}

    def init_with_config(self, conn_info, config_3: fuse_config) -> None:
        # Nothing may be remembered by the kernel: it would not ask, and so hear no lie.
        # Two names of one file must have one number.
        config_3.entry_timeout = config_3.attr_timeout = config_3.negative_timeout = 0
        config_3.use_ino = config_3.hard_remove = 1

    def _real(self, path: str) -> str:
        return (self._backing + path).rstrip("/")

    def _refuse_if(self, switch: str) -> None:
        name = self._switches.get(switch)
        if name is not None:
            refuse(name)

    def _changing(self, path: str) -> str:
        """Remember what a directory shows before a name in it changes."""
        real = self._real(path)
        parent = os.path.dirname(real)
        older = self._older.setdefault(parent, [])
        older.append(os.listdir(parent))
        del older[:-_REMEMBERED]
        return real

    # Names.

    def getattr(self, path, fh=None):
        if fh:
            status = os.fstat(fh)
        else:
            real = self._real(path)
            status = os.lstat(self._posing.pop(real, real))
        found = {name: getattr(status, name) for name in _STATUS}
        found.update({name: getattr(status, f"{name}_ns") for name in _TIMES})
        return found

    def readlink(self, path):
        return os.readlink(self._real(path))

    def mkdir(self, path, mode):
        os.mkdir(self._changing(path), mode)

    def rmdir(self, path):
        os.rmdir(self._changing(path))

    def unlink(self, path):
        os.unlink(self._changing(path))

    def symlink(self, target, source):
        os.symlink(source, self._changing(target))

    def rename(self, old, new):
        source, target = self._changing(old), self._changing(new)
        os.rename(source, target)

    def link(self, target, source):
        how = self._switches.get("link")
        real, name = self._real(source), self._changing(target)
        if how is None:
            os.link(real, name, follow_symlinks=False)
        elif how == "copy":
            shutil.copyfile(real, name)
        elif how in ("symlink", "posing symlink"):
            os.symlink(os.path.relpath(real, os.path.dirname(name)), name)
            # The kernel fails the call if its answer is no file. It asks once.
            if how == "posing symlink":
                self._posing[name] = real
        else:
            refuse(how)

    def chmod(self, path, mode):
        os.chmod(self._real(path), mode)

    def chown(self, path, uid, gid):
        os.chown(self._real(path), uid, gid, follow_symlinks=False)

    def utimens(self, path, times=None):
        os.utime(self._real(path), ns=times, follow_symlinks=False)

    def access(self, path, amode):
        if not os.access(self._real(path), amode):
            refuse("EACCES")

    def statfs(self, path):
        found = os.statvfs(self._real(path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    # Directories.

    def opendir(self, path, flags):
        real = self._real(path)
        # Python's listing opens so; who wants to fsync the directory does not.
        listing = flags & os.O_NONBLOCK
        if not listing:
            self._refuse_if("open_dir")
        lie = self._switches.turn("listing", real) if listing else None
        # ESTALE is told by the listing: where it is opened, the kernel tries again.
        if lie is not None and lie["lie"] in ("ENOENT", "EMFILE", "EIO", "EACCES"):
            refuse(lie["lie"])
        descriptor = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if lie is not None:
            self._lies[descriptor] = lie
        return descriptor

    def readdir(self, path, fh):
        names = sorted(os.listdir(fh))
        lie = self._lies.pop(fh, None)
        if lie is not None:
            names = self._untrue(self._real(path), names, lie)
        for name in (".", "..", *names):
            # One without a number would be left out, as one that was deleted.
            yield name, {"st_mode": 0, "st_ino": 1}, 0

    def _untrue(self, real: str, names: list[str], lie: dict[str, Any]) -> list[str]:
        kind = lie["lie"]
        if kind == "empty":
            return []
        if kind == "short":  # the names that come last are the newest
            return names[: len(names) // 2]
        if kind == "names":
            return lie["names"]
        if kind == "old":
            older = self._older.get(real, [])[-lie.get("back", 1) :]
            return older[0] if older else names
        refuse(kind)
        raise AssertionError(kind)

    def releasedir(self, path, fh):
        self._lies.pop(fh, None)
        os.close(fh)

    def fsyncdir(self, path, datasync, fh):
        time.sleep(self._switches.get("sync_seconds") or 0)
        self._refuse_if("sync_dir")
        os.fsync(fh)

    # Files.

    def create(self, path, mode, flags):
        real = self._changing(path)
        made = flags & ~(os.O_DIRECT | os.O_APPEND) | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(real, made, mode)
        if flags & os.O_DIRECT and self._switches.get("direct") is not None:
            os.close(descriptor)  # as on Linux, where the file is made before that
            self._refuse_if("direct")
        return descriptor

    def open(self, path, flags):
        real = self._real(path)
        lie = self._switches.turn("open", real)
        if lie is not None:
            refuse(lie["lie"])
        if flags & os.O_DIRECT:
            self._refuse_if("direct")
        return os.open(real, flags & ~(os.O_DIRECT | os.O_APPEND) | os.O_CLOEXEC)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        os.truncate(fh or self._real(path), length)

    def fsync(self, path, datasync, fh):
        time.sleep(self._switches.get("sync_seconds") or 0)
        self._refuse_if("sync_file")
        os.fsync(fh)

    def fallocate(self, path, mode, offset, length, fh):
        self._refuse_if("fallocate")
        if mode:
            refuse("EOPNOTSUPP")
        os.posix_fallocate(fh, offset, length)

    def release(self, path, fh):
        os.close(fh)


class LockingDisk(OddDisk):
    """The same, which keeps the locks itself: two mounts of a directory exclude another."""

    def flock(self, path, fh, op):
        how = self._switches.get("flock")
        if how == "ignored":
            return
        if how is not None:
            refuse(how)
        # The kernel waits for nobody: who asks to wait is told so, as by a server that is
        # restarted; nothing else could be served meanwhile.
        fcntl.flock(fh, op | fcntl.LOCK_NB)


class Mount(FUSE):
    """Hands on how a directory is opened, which the library does not."""

    def opendir(self, path, fip):
        opened = fip.contents
        opened.fh = self.operations.opendir(path.decode(), opened.flags)
        return 0


def main() -> None:
    where, backing, switches, locks, seconds = sys.argv[1:]
    signal.alarm(int(seconds))
    kinds = {"kernel": OddDisk, "server": LockingDisk}
    disk = kinds[locks](Path(backing), Switches(Path(switches)))
    # Any user's calls are passed on: some tests run as another one.
    Mount(disk, where, foreground=True, nothreads=True, allow_other=True)


if __name__ == "__main__":
    main()
