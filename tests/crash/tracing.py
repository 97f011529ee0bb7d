# SPDX-License-Identifier: Apache-2.0
"""Faults of system calls, made by strace in a rank that runs: no stand-in is involved.

A rank that is to suffer starts strace on itself for the time of one save or restore, so
calls are counted from there on, and neither Python's own start nor MPI's is hit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.crash.faults import Fault

# What a fault is called -> the system calls. Which of them a C library makes differs, and
# not every machine has all: strace passes over those with a question mark.
SYSTEM_CALLS = {
    "openat": "openat",
    "pwrite64": "pwrite64",
    "pwrite64 of nothing": "pwrite64",
    "preadv": "preadv,?preadv2",
    "pread64": "pread64",
    "fsync": "fsync",
    "rename": "?rename,?renameat,?renameat2",
    "link": "?link,linkat",
    "mkdir": "?mkdir,mkdirat",
    "unlink": "?unlink,unlinkat",
    "rmdir": "?rmdir",
    "ftruncate": "ftruncate",
    "fallocate": "fallocate",
    "flock": "flock",
    "getdents64": "getdents64",
    "statfs": "statfs",
}

NOTHING = "pwrite64 of nothing"
"""A short transfer that strace can make without a lie: no byte is written, and 0 told."""

ERRNOS = (
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.ESTALE,
    errno.EINTR,
    errno.ENOENT,
    errno.EMFILE,
)

_ATTACH_SECONDS = 30
_PR_SET_PTRACER = 0x59616D61
_ANYBODY = ctypes.c_ulong(-1)
_SYNCED_ONCE = re.compile(r"fsync\(\d+<(\S+\.(?:safetensors|bin|json))>")


class Traced:
    """A fault of one system call of this process; see `tests.crash.faults.Faulty`.

    Attributes:
        fired: Whether the fault hit a file of the sandbox.
        missed: Whether it hit something else, such as a source read for a traceback.
        retried: Files that were fsynced again after an fsync of them failed.
    """

    def __init__(self, fault: Fault, sandbox: Path) -> None:
        self._fault = fault
        self._sandbox = str(sandbox)
        self.fired = 0
        self.missed = 0
        self.retried: list[str] = []

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have this process traced, with the fault."""
        folder = Path(tempfile.mkdtemp(prefix="mpi_ckpt-trace-"))
        calls = SYSTEM_CALLS[self._fault.call]
        name = errno.errorcode[self._fault.errno]
        how = "retval=0" if self._fault.call == NOTHING else f"error={name}"
        often = "+" if self._fault.forever else ""
        inject = f"inject={calls}:{how}:when={self._fault.nth}{often}"
        try:
            with traced(folder, calls, "-e", inject):
                yield
        finally:
            self._read(sorted(folder.iterdir()))
            shutil.rmtree(folder)

    def close_kept(self) -> None:
        """Nothing is kept open."""

    def _read(self, logs: list[Path]) -> None:
        for log in logs:  # one of each thread
            failed: set[str] = set()
            for line in log.read_text(errors="replace").splitlines():
                synced = _SYNCED_ONCE.match(line)
                if synced and synced[1] in failed:
                    self.retried.append(synced[1])
                if "(INJECTED)" in line:
                    hit = self._sandbox in line
                    self.fired += hit
                    self.missed += not hit
                    # What a signal has interrupted has not failed: Python itself calls
                    # again (PEP 475).
                    if synced and self._fault.errno != errno.EINTR:
                        failed.add(synced[1])


@contextlib.contextmanager
def traced(folder: Path, calls: str, *more: str) -> Iterator[None]:
    """Have this process and its threads traced by strace.

    Args:
        folder: Where a log for each thread goes.
        calls: The system calls to trace.
        more: Further arguments of strace.

    Raises:
        PermissionError: If that is not allowed here.
    """
    # Where a process may only trace its children, it may be told of an exception.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)
    command = ["strace", "-ff", "-y", "-s", "0", "-o", str(folder / "log"), *more]
    command += ["-e", f"trace={calls}", "-e", "signal=none", "-p", str(os.getpid())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        try:
            told = strace.stderr.readline()
            if "attached" not in told:
                raise PermissionError(f"strace: {told.strip()}")
            yield
        finally:
            strace.terminate()  # lets go of this process
            strace.stderr.close()
            strace.wait(_ATTACH_SECONDS)


def why_not() -> str:
    """Tell why strace cannot be used here; empty if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with traced(Path(folder), "fsync"):
                pass
        except (OSError, subprocess.SubprocessError) as error:
            return f"strace is not allowed here: {error}"
    return ""
