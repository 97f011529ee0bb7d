# SPDX-License-Identifier: Apache-2.0
"""Reads from a log of strace what a process did to a directory: a recorder beside the seam.

Pure. What `recorder.Recorder` notes is what the library says that it does; strace sees what
the kernel was asked for, by anybody in the process. One log is that of one process with all
its threads, made with `COMMAND`: absolute times, and text in hexadecimal, so that no name
or byte can look like anything else.

Only calls that were carried out count. A call that changes the directory in a way which
this module does not know is an error: teach it here and in ``replay`` before the library
may use it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.crash.recorder import Op
from tests.directories import LOSSY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MARK = "/dev/null/mark/"
"""To open this path, which cannot be there, with a number behind it is to note that."""

_LINE = re.compile(r"(\d+) +(\d+)\.(\d{6}) (.*)")
_WHOLE = re.compile(r"(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+|\?)(.*)")
_BEGUN = re.compile(r"(\w+)\((.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)")
_NOT_CALLS = re.compile(r"\+\+\+|---")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_DESCRIPTOR = re.compile(r"(-?\d+|AT_FDCWD)(?:<((?:\\x[0-9a-f]{2})*)>)?(\(deleted\))?")
_SEPARATOR = re.compile(r", (?![^\[{]*[\]}])")
# Call -> where the directories are that its paths are relative to.
_DIRECTORIES = {
    "openat": (0,),
    "mkdirat": (0,),
    "unlinkat": (0,),
    "symlinkat": (1,),
    "mknodat": (0,),
    "renameat": (0, 2),
    "renameat2": (0, 2),
    "linkat": (0, 2),
}
_WITH_PATHS = (
    *("open", "creat", "truncate", "mkdir", "rmdir", "mknod"),
    *("rename", "link", "symlink", "unlink"),
)


@dataclass(frozen=True)
class Call:
    """One system call: when it was told of, in nanoseconds, and how it ended."""

    time: int
    name: str
    arguments: tuple[str, ...]
    result: int
    error: str

    def text(self, position: int) -> bytes:
        """Return a string that was passed."""
        match = _TEXT.fullmatch(self.arguments[position])
        if match is None or match[2]:
            raise ValueError(f"{self.name}: no whole text in {self.arguments[position]}")
        return _unescape(match[1])

    def descriptor(self, position: int) -> tuple[int, str]:
        """Return a descriptor that was passed, and the path it is of; -1 for none."""
        match = _DESCRIPTOR.fullmatch(self.arguments[position])
        if match is None:
            raise ValueError(f"{self.name}: no descriptor in {self.arguments[position]}")
        number = -1 if match[1] == "AT_FDCWD" else int(match[1])
        return number, os.fsdecode(_unescape(match[2] or ""))

    def paths(self) -> list[str]:
        """Return the absolute paths that were passed, in order."""
        if self.name in _DIRECTORIES:
            return [
                os.path.join(self.descriptor(at)[1], os.fsdecode(self.text(at + 1)))
                for at in _DIRECTORIES[self.name]
            ]
        if self.name in _WITH_PATHS:
            texts = [
                at for at, argument in enumerate(self.arguments) if argument[:1] == '"'
            ]
            return [os.path.abspath(os.fsdecode(self.text(at))) for at in texts]
        return []

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.arguments)[:200]}) = {self.result}"


def parse_calls(log: str) -> Iterator[Call]:
    """Read a log; what was interrupted by other threads is put together.

    Raises:
        ValueError: If a line is not understood.
    """
    begun: dict[str, str] = {}
    for line in log.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"not a line of strace: {line[:200]}")
        thread, seconds, micros, rest = match.groups()
        if _NOT_CALLS.match(rest):
            continue
        if half := _BEGUN.fullmatch(rest):
            begun[thread] = f"{half[1]}({half[2]}"
            continue
        if half := _RESUMED.fullmatch(rest):
            rest = begun.pop(thread) + half[2]
        whole = _WHOLE.fullmatch(rest)
        if whole is None:
            raise ValueError(f"not a call: {rest[:200]}")
        name, arguments, result, tail = whole.groups()
        if result != "?":  # the process ended in it
            time = int(seconds) * 10**9 + int(micros) * 1000
            error = tail.split()[0] if result == "-1" and tail else ""
            given = tuple(_SEPARATOR.split(arguments))
            yield Call(time, name, given, int(result, 0), error)


def read_log(log: str, sandbox: str) -> tuple[list[int], list[Op]]:
    """Return times and operations on all that is below a directory, in order.

    The lock files in it are left out, as they hold no data.

    Raises:
        ValueError: If the log is not understood.
        AssertionError: If something was done that no recorder knows.
    """
    reader = _Reader(sandbox)
    for call in parse_calls(log):
        reader.take(call)
    return reader.times, reader.ops


class _Reader:
    """Follows calls one by one."""

    def __init__(self, sandbox: str) -> None:
        self.times: list[int] = []
        self.ops: list[Op] = []
        self._sandbox = sandbox
        # Descriptor -> path and number of the file, 0 for a directory.
        self._open: dict[int, tuple[str, int]] = {}
        self._serial = 0
        # Files that may have been made although to open them was refused.
        self._refused: set[str] = set()

    def take(self, call: Call) -> None:
        """Take in one call."""
        if call.name == "openat" and call.paths()[0].startswith(MARK):
            self._note(call, Op("mark", note=int(call.paths()[0].removeprefix(MARK))))
        elif self._concerns(call):
            if call.name not in _HANDLERS:
                raise AssertionError(f"no recorder knows this: {call}")
            _HANDLERS[call.name](self, call)

    def opened(self, call: Call) -> None:
        flags = _words(call)
        path = self._relative(call.paths()[0])
        if "O_TMPFILE" in flags:
            raise AssertionError(f"no recorder knows files without a name: {call}")
        writes = flags & {"O_WRONLY", "O_RDWR"}
        if writes and not {"O_CREAT", "O_EXCL"} <= flags:
            raise AssertionError(f"opened for writing, though it may exist: {call}")
        if call.result < 0:
            # Linux makes a file before it refuses to open it for direct writes.
            if {"O_CREAT", "O_DIRECT"} <= flags and call.error == "EINVAL":
                self._refused.add(path)
            return
        self._open.pop(call.result, None)
        if "O_CREAT" in flags:
            self._open[call.result] = (path, self._create(call, path))
        elif "O_DIRECTORY" in flags:
            self._open[call.result] = (path, 0)

    def closed(self, call: Call) -> None:
        self._open.pop(call.descriptor(0)[0], None)

    def wrote(self, call: Call) -> None:
        data, offset = call.text(1)[: max(call.result, 0)], int(call.arguments[3])
        self._note_on_file(call, "pwrite", offset=offset, data=data)

    def cut(self, call: Call) -> None:
        self._note_on_file(call, "cut", offset=int(call.arguments[1]))

    def extended(self, call: Call) -> None:
        if call.arguments[1] != "0":
            raise AssertionError(f"no recorder knows this: {call}")
        end = int(call.arguments[2]) + int(call.arguments[3])
        self._note_on_file(call, "extend", offset=end)

    def synced(self, call: Call) -> None:
        is_file = self._open[call.descriptor(0)[0]][1] > 0
        self._note_on_file(call, "sync_file" if is_file else "sync_dir")

    def made(self, call: Call) -> None:
        self._note_on_name(call, "mkdir")

    def renamed(self, call: Call) -> None:
        self._note_on_name(call, "rename")

    def linked(self, call: Call) -> None:
        self._note_on_name(call, "link")

    def removed(self, call: Call) -> None:
        path = self._relative(call.paths()[0])
        if call.result == 0 and path in self._refused:
            self._create(call, path)
        is_directory = call.name == "rmdir" or "AT_REMOVEDIR" in _words(call)
        self._note_on_name(call, "rmdir" if is_directory else "unlink")

    def _concerns(self, call: Call) -> bool:
        """Tell whether a call has to do with what is below the directory."""
        if call.name == "mmap" and not {"PROT_WRITE", "MAP_SHARED"} <= _words(call):
            return False
        where = call.paths()
        for position, argument in enumerate(call.arguments):
            if argument[:1].isdecimal() and "<" in argument:
                where.append(call.descriptor(position)[1])
        return any(self._is_inside(path) for path in where)

    def _is_inside(self, path: str) -> bool:
        inside = path == self._sandbox or path.startswith(self._sandbox + "/")
        return inside and os.path.basename(path) not in (".lock", *LOSSY)

    def _create(self, call: Call, path: str) -> int:
        self._refused.discard(path)
        self._serial += 1
        self._note(call, Op("create", path, file=self._serial))
        return self._serial

    def _note_on_file(self, call: Call, kind: str, **details: Any) -> None:
        path, serial = self._open[call.descriptor(0)[0]]
        if call.result >= 0:
            self._note(call, Op(kind, path, file=serial, **details))

    def _note_on_name(self, call: Call, kind: str) -> None:
        if call.result >= 0:
            self._note(call, Op(kind, *map(self._relative, call.paths())))

    def _note(self, call: Call, op: Op) -> None:
        self.times.append(call.time)
        self.ops.append(op)

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self._sandbox)


def _words(call: Call) -> set[str]:
    """Return the flags that were passed, of all arguments."""
    return {
        word for argument in call.arguments for word in re.findall(r"\b[A-Z_]+\b", argument)
    }


def _unescape(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


_HANDLERS: dict[str, Callable[[_Reader, Call], None]] = {
    "openat": _Reader.opened,
    "close": _Reader.closed,
    "pwrite64": _Reader.wrote,
    "ftruncate": _Reader.cut,
    "fallocate": _Reader.extended,
    "fsync": _Reader.synced,
    "mkdir": _Reader.made,
    "mkdirat": _Reader.made,
    "rename": _Reader.renamed,
    "renameat": _Reader.renamed,
    "renameat2": _Reader.renamed,
    "link": _Reader.linked,
    "linkat": _Reader.linked,
    "unlink": _Reader.removed,
    "unlinkat": _Reader.removed,
    "rmdir": _Reader.removed,
}

# In the directory each of these is an error.
_OTHER_CHANGES = (
    "open,creat,write,writev,pwritev,pwritev2,fdatasync,sync_file_range,truncate,symlink,"
    "symlinkat,mknod,mknodat,copy_file_range,sendfile,splice,dup,dup2,dup3,mmap"
)

COMMAND = (
    *("strace", "-f", "-qq", "-ttt", "-y", "-xx", "-s", "16777216"),
    *("-e", "signal=none", "-e", f"trace={','.join(_HANDLERS)},{_OTHER_CHANGES}"),
)
"""How logs are made; what follows is ``-o``, the file, and the program."""
