# SPDX-License-Identifier: Apache-2.0
"""Lines of strace are understood, or refused."""

from __future__ import annotations

import re

import pytest

from tests.crash.recorder import Op
from tests.crash.strace_log import MARK, parse_calls, read_log

BOX = "/box"


def escaped(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def log(*calls: str, thread: int = 7) -> str:
    """Return lines as strace writes them, of calls in which text is readable."""
    lines = []
    for number, call in enumerate(calls):
        hexed = re.sub(r'"([^"]*)"', lambda m: f'"{escaped(m[1])}"', call)
        hexed = re.sub(r"<(/[^>]*)>", lambda m: f"<{escaped(m[1])}>", hexed)
        lines.append(f"{thread} 1000.{number:06} {hexed}")
    return "\n".join(lines)


def ops(*calls: str) -> list[Op]:
    return read_log(log(*calls), BOX)[1]


def created(path: str, flags: str = "O_WRONLY|O_CREAT|O_EXCL|O_CLOEXEC") -> str:
    return f'openat(AT_FDCWD</>, "{path}", {flags}, 0666) = 5<{path}>'


def test_a_file_is_followed_by_its_descriptor():
    assert ops(
        'mkdir("/box/new", 0777) = 0',
        created("/box/new/file", "O_WRONLY|O_CREAT|O_EXCL|O_DIRECT|O_NOFOLLOW"),
        "fallocate(5</box/new/file>, 0, 0, 8192) = 0",
        'pwrite64(5</box/new/file>, "abc", 3, 4096) = 3',
        "ftruncate(5</box/new/file>, 4099) = 0",
        "fsync(5</box/new/file>) = 0",
        "close(5</box/new/file>) = 0",
        'openat(AT_FDCWD</>, "/box/new", O_RDONLY|O_DIRECTORY) = 5</box/new>',
        "fsync(5</box/new>) = 0",
    ) == [
        Op("mkdir", "new"),
        Op("create", "new/file", file=1),
        Op("extend", "new/file", file=1, offset=8192),
        Op("pwrite", "new/file", file=1, offset=4096, data=b"abc"),
        Op("cut", "new/file", file=1, offset=4099),
        Op("sync_file", "new/file", file=1),
        Op("sync_dir", "new"),
    ]


def test_names_may_be_relative_to_a_directory():
    assert ops(
        'mkdirat(3</box>, "a", 0777) = 0',
        'renameat2(3</box>, "a", AT_FDCWD</box>, "b", RENAME_NOREPLACE) = 0',
        'rename("/box/b", "/box/c") = 0',
        'linkat(AT_FDCWD</>, "/box/c/f", AT_FDCWD</>, "/box/c/g", 0) = 0',
        'link("/box/c/g", "/box/c/h") = 0',
        'unlinkat(4</box/c>, "f", 0) = 0',
        'unlinkat(3</box>, "c", AT_REMOVEDIR) = 0',
        'rmdir("/box/d") = 0',
    ) == [
        Op("mkdir", "a"),
        Op("rename", "a", "b"),
        Op("rename", "b", "c"),
        Op("link", "c/f", "c/g"),
        Op("link", "c/g", "c/h"),
        Op("unlink", "c/f"),
        Op("rmdir", "c"),
        Op("rmdir", "d"),
    ]


def test_what_failed_or_was_short_counts_as_far_as_it_came():
    path = "/box/file"
    assert ops(
        'mkdir("/box/no", 0777) = -1 ENOSPC (No space left on device)',
        created(path),
        f'pwrite64(5<{path}>, "abcdef", 6, 0) = 2',
        f'pwrite64(5<{path}>, "cdef", 4, 2) = -1 ENOSPC (No space left on device)',
        f"fsync(5<{path}>) = -1 EIO (Input/output error) (INJECTED)",
        f'unlink("{path}" <unfinished ...>',
    ) == [
        Op("create", "file", file=1),
        Op("pwrite", "file", file=1, offset=0, data=b"ab"),
    ]


def test_a_refused_direct_open_has_made_a_file_that_is_deleted():
    refused = 'openat(AT_FDCWD</>, "/box/f", O_WRONLY|O_CREAT|O_EXCL|O_DIRECT, 0666)'
    gone = ops(f"{refused} = -1 EINVAL (Invalid argument)", 'unlink("/box/f") = 0')
    assert gone == [Op("create", "f", file=1), Op("unlink", "f")]


def test_halves_of_a_call_are_put_together():
    lines = log(
        'mkdir("/box/a", 0777 <unfinished ...>',
        'mkdir("/box/b", 0777) = 0',
        "<... mkdir resumed>) = 0",
        "+++ exited with 0 +++",
    ).splitlines()
    lines[1] = lines[1].replace("7 ", "8 ", 1)
    times, found = read_log("\n".join(lines), BOX)
    assert [op.path for op in found] == ["b", "a"]
    assert times == [1000 * 10**9 + 1000, 1000 * 10**9 + 2000]


def test_marks_are_calls_that_fail():
    line = f'openat(AT_FDCWD</>, "{MARK}3", O_RDONLY) = -1 ENOTDIR (Not a directory)'
    assert ops(line) == [Op("mark", note=3)]


def test_other_files_and_the_lock_are_left_out():
    assert (
        ops(
            'mkdir("/boxes", 0777) = 0',
            'openat(AT_FDCWD</>, "/log", O_WRONLY|O_CREAT, 0666) = 5</log>',
            'write(5</log>, "hello", 5) = 5',
            "mmap(NULL, 9, PROT_READ|PROT_WRITE, MAP_SHARED, 5</log>, 0) = 0x7f00",
            "mmap(NULL, 9, PROT_READ, MAP_PRIVATE, 6</box/file>, 0) = 0x7f00",
            'openat(AT_FDCWD</>, "/box/.lock", O_RDWR|O_CREAT, 0666) = 5</box/.lock>',
            'pwrite64(5</box/.lock>, "me", 2, 0) = 2',
        )
        == []
    )


@pytest.mark.parametrize(
    "call",
    [
        'openat(AT_FDCWD</>, "/box", O_RDWR|O_TMPFILE, 0600) = 5</box/#7 (deleted)>',
        'openat(AT_FDCWD</>, "/box/file", O_WRONLY|O_CREAT, 0666) = 5</box/file>',
        'openat(AT_FDCWD</>, "/box/file", O_RDWR) = 5</box/file>',
        'write(5</box/file>, "abc", 3) = 3',
        'pwritev(5</box/file>, [{iov_base="abc", iov_len=3}], 1, 0) = 3',
        "fdatasync(5</box/file>) = 0",
        'symlink("/elsewhere", "/box/link") = 0',
        "mmap(NULL, 9, PROT_READ|PROT_WRITE, MAP_SHARED, 5</box/file>, 0) = 0x7f00",
        "fallocate(5</box/file>, FALLOC_FL_PUNCH_HOLE, 0, 4096) = 0",
        "dup(5</box/file>) = 6</box/file>",
    ],
)
def test_what_no_recorder_knows_is_an_error(call):
    with pytest.raises(AssertionError, match=r"no recorder knows|though it may exist"):
        ops(call)


@pytest.mark.parametrize(
    "lines",
    ["what is this", "7 1000.000000 what is this", log('mkdir("/box/a"..., 0777) = 0')],
)
def test_lines_that_are_not_understood_are_an_error(lines):
    with pytest.raises(ValueError, match=r"not a line|not a call|no whole text"):
        read_log(lines, BOX)


def test_a_call_says_what_it_was():
    (call,) = parse_calls(log('rename("/box/a", "/box/b") = -1 EXDEV (Invalid link)'))
    assert (call.name, call.result, call.error) == ("rename", -1, "EXDEV")
    assert call.paths() == ["/box/a", "/box/b"]
