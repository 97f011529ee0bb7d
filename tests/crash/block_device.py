# SPDX-License-Identifier: Apache-2.0
"""ext4 on a block device that logs its writes and flushes, and fails when it is asked to.

A loop device on a file that ``programs/logged_disk.py`` serves through FUSE. That program
ends by itself after a while, and every call that waits for the device then fails: nothing
can hang on it for longer.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.crash.block_log import Record, decoded
from tests.fuse import NotHereError, served
from tests.waiting import limit

if TYPE_CHECKING:
    from collections.abc import Iterator

LIFETIME = 100  # seconds: pytest's own limit must be longer
# noauto_da_alloc: by default ext4 hides a missing fsync before a rename. commit: no flush
# but those that somebody asked for.
OPTIONS = "loop,noauto_da_alloc,commit=300,errors=remount-ro"

_MEBIBYTES = 16
_REPOSITORY = Path(__file__).parents[2]
_PATIENCE = limit(90)  # seconds, for what takes none


class BlockDevice:
    """A disk with an empty ext4.

    Raises:
        NotHereError: If something that it takes is missing.
    """

    def __init__(self, folder: Path) -> None:
        _look_for_all()
        self._contents, self._log = folder / "contents", folder / "log"
        self._fail, self._served = folder / "fail", folder / "served"
        self._where = folder / "disk"
        self._served.mkdir()
        self._where.mkdir()
        with self._contents.open("wb") as file:
            file.truncate(_MEBIBYTES << 20)
        make = ["mkfs.ext4", "-qF", "-E", "lazy_itable_init=0", str(self._contents)]
        subprocess.run(make, check=True, timeout=_PATIENCE)

    @contextlib.contextmanager
    def plugged_in(self) -> Iterator[None]:
        """Have the device for the block, with an empty ext4 and a new log.

        Raises:
            NotHereError: If FUSE is not allowed.
        """
        module = "tests.crash.programs.logged_disk"
        paths = (self._served, self._contents, self._log, self._fail)
        with served(self._served, module, (*paths, LIFETIME)) as self._program:
            yield

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """Mount the device, which is plugged in; give the checkpoint directory."""
        with mounted(self._served / "disk", self._where):
            yield self._where / "ckpt"

    def acknowledge(self, save: int) -> None:
        """Note in the log, now, that a save was acknowledged."""
        descriptor = os.open(self._served / "acknowledged", os.O_WRONLY)
        try:
            os.write(descriptor, str(save).encode())
        finally:
            os.close(descriptor)

    def fail(self) -> None:
        """Fail every write and flush from now on."""
        self._fail.touch()

    def mend(self) -> None:
        self._fail.unlink(missing_ok=True)

    def pull_out(self) -> None:
        """End the program that serves the device: all that waits for it fails."""
        self._program.kill()
        self._program.wait()

    def records(self) -> list[Record]:
        """Return all that was done to the disk since it was plugged in."""
        return decoded(self._log.read_bytes())

    def first_contents(self) -> bytes:
        """Return what was on the disk before all that."""
        return self._contents.read_bytes()


@contextlib.contextmanager
def mounted(image: Path, where: Path) -> Iterator[None]:
    """Mount an ext4 in a file; its loop device goes with the mount.

    Raises:
        NotHereError: If mounting is not allowed.
    """
    command = ["mount", "-t", "ext4", "-o", OPTIONS, str(image), str(where)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHereError(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        busy = subprocess.run(["umount", str(where)], check=False).returncode
        if busy:
            subprocess.run(["umount", "--lazy", str(where)], check=True)


def _look_for_all() -> None:
    if os.geteuid() != 0:
        raise NotHereError("mounting takes root")
    if not os.path.exists("/dev/fuse"):
        raise NotHereError("/dev/fuse is missing")
    if importlib.util.find_spec("fuse") is None:
        raise NotHereError("fusepy is missing: pip install fusepy")
    if ctypes.util.find_library("fuse") is None:
        raise NotHereError("libfuse.so.2 is missing: apt-get install libfuse2")
    if shutil.which("mkfs.ext4") is None:
        raise NotHereError("mkfs.ext4 is missing: apt-get install e2fsprogs")
