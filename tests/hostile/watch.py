# SPDX-License-Identifier: Apache-2.0
"""Watches a piece of work on a bad input: what it runs, writes, and takes of the machine.

Python's audit events tell of every file that is opened, every name that is changed, every
class that an unpickler looks up and every process that is started, whoever asks for it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU_SECONDS_MAX = 1.0
"""Of this process, all threads: wall-clock time would measure the machine's other work."""
EXTRA_BYTES_MAX = 128 << 20
"""A forged size asks for gigabytes. A manifest of a million dimensions, parsed, takes
30 MiB; a process with much freed memory has shown 75 MiB for it.
"""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = (
    *("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir"),
    *("os.truncate", "os.chmod", "os.chown", "os.mkfifo", "os.utime", "os.setxattr"),
)
_STARTS = (
    *("pickle.find_class", "os.system", "os.exec", "os.fork", "os.forkpty", "os.spawn"),
    *("os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen"),
)


@dataclass
class Watch:
    """What was seen.

    Attributes:
        root: Below it, anything may be written.
        run: Events that mean code chosen by a file, or a program, or a connection.
        outside: Events that changed something outside of the root.
        cpu_seconds: Time of this process.
        extra_bytes: Peak of its memory above that at the start.
    """

    root: Path
    run: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0
    extra_bytes: int = 0

    def note(self, event: str, given: tuple[object, ...]) -> None:
        if event in _STARTS:
            self.run.append(f"{event} {given[:2]}")
        elif event == "open":
            if isinstance(given[2], int) and given[2] & _WRITING:
                self._note_change(event, given[:1])
        elif event in _CHANGES:
            # What a link says changes nothing there.
            self._note_change(event, given[1:] if event == "os.symlink" else given)

    def _note_change(self, event: str, given: tuple[object, ...]) -> None:
        paths = [
            os.fsdecode(path) for path in given if isinstance(path, (str, bytes, Path))
        ]
        for path in paths:
            real = os.path.realpath(os.path.dirname(path))
            ours = f"{real}/".startswith(f"{os.path.realpath(self.root)}/")
            ours = ours or os.path.abspath(path) == str(self.root)
            # Python keeps what it compiles when a module is first imported.
            if not ours and "__pycache__" not in path:
                self.outside.append(f"{event} {path}")


_watching: list[Watch] = []
# Looked up now, as to load a library is one of the events; glibc alone has it.
_give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)


def _hook(event: str, given: tuple[object, ...]) -> None:
    for watch in _watching:
        watch.note(event, given)


sys.addaudithook(_hook)


@contextmanager
def watched(root: Path) -> Iterator[Watch]:
    """Watch the block; fail if it runs code, writes elsewhere or takes too much."""
    watch = Watch(root)
    before = _reset_peak()
    start = time.process_time()
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)
    watch.cpu_seconds = time.process_time() - start
    watch.extra_bytes = _status("VmHWM") - before
    assert not watch.run, f"code was run: {watch.run}"
    assert not watch.outside, f"changed outside of {root}: {watch.outside}"
    assert watch.cpu_seconds <= CPU_SECONDS_MAX, f"{watch.cpu_seconds} seconds"
    assert watch.extra_bytes <= EXTRA_BYTES_MAX, f"{watch.extra_bytes} extra bytes"


def _reset_peak() -> int:
    # What earlier work has freed is still this process's: taken again, it would not count.
    gc.collect()
    if _give_back is not None:
        _give_back(0)
    # Writing 5 sets the peak to what is in use now; proc(5).
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
