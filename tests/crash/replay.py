# SPDX-License-Identifier: Apache-2.0
"""What may be on disk after a power cut: a pure model of files, names and fsync.

From a base image and recorded operations it builds directory states that a file system
may show after a crash behind any prefix of the operations:

- Bytes of a file are durable once the file was fsynced. Until then they may be missing
  (the file keeps the length it had), be zeros, or be torn: any subset of their 4 KiB
  pieces, in any order, with any length that is a multiple of 4 KiB.
- A name (create, mkdir, link, rename, unlink, rmdir) is durable once its directory was
  fsynced after; for a rename between directories, once both were. Until then names may
  be lost in order (a prefix of what is pending stays, as with a journal), or out of order
  (any subset in which no operation lacks one that it builds upon).
- fsync of a file makes its bytes durable, but not its name. That is stricter than the
  file systems of Linux are; POSIX promises no more.
- A rename is atomic: it has happened or it has not.

Images are dicts: path relative to the sandbox -> bytes, or None for a directory.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpi_ckpt.storage.format.layout import LOCK
from tests.directories import LOSSY

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator, Sequence

    from tests.crash.recorder import Op

Image = dict[str, bytes | None]

PIECE = 4096


def read_image(sandbox: Path) -> Image:
    """Return all that is below a directory; lock files hold no data and are left out."""
    image: Image = {}
    for folder, folders, files in os.walk(sandbox):
        for name in folders:
            image[os.path.relpath(os.path.join(folder, name), sandbox)] = None
        for name in files:
            if name not in (".lock", *LOSSY):
                path = Path(folder, name)
                image[os.path.relpath(path, sandbox)] = path.read_bytes()
    return image


def write_image(image: Image, sandbox: Path) -> None:
    """Make an image real below an existing, empty directory."""
    for path in sorted(image):
        content = image[path]
        if content is None:
            os.makedirs(sandbox / path, exist_ok=True)
        else:
            (sandbox / path).write_bytes(content)


def image_digest(image: Image) -> bytes:
    """Return a hash by which equal states are found.

    The job's name, the time and with them the manifest's own digest make no new state.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(image):
        content = image[path]
        if content is not None and path.endswith("manifest.json"):
            content = _OF_ONE_RUN.sub(b"", content)
        kind = b"d" if content is None else b"f%d:" % len(content)
        digest.update(_JOB.sub("-JOB", path).encode() + b"\0" + kind + (content or b""))
    return digest.digest()


_JOB = re.compile(r"-[0-9a-f]{12}(?=/|$)")
_OF_ONE_RUN = re.compile(rb'"(time|job)":[^,]*|"digest":"[^"]*"}\n?\Z')


@dataclass(frozen=True)
class _Edit:
    """Bytes written at an offset; or, without bytes, a new length."""

    offset: int
    data: bytes | None = None
    is_cut: bool = False


@dataclass
class _File:
    """A file: what is durable, and what was done to it since, in order."""

    durable: bytes = b""
    pending: list[_Edit] = field(default_factory=list)


@dataclass(frozen=True)
class _Change:
    """One change of names.

    Attributes:
        entries: (directory, name, what it now names; None for nothing).
        needs: Positions of earlier changes without which this one cannot be.
        directories: All of these must be fsynced for it to be durable.
    """

    entries: tuple[tuple[int, str, int | None], ...]
    needs: frozenset[int]
    directories: frozenset[int]


@dataclass(frozen=True)
class Choice:
    """Which of all that may be lost is lost.

    Attributes:
        names: Which pending changes of names stay: "all", "none", an int (that many, in
            order) or a float (each with this probability, out of order).
        data: What becomes of bytes not fsynced: "all", "none", "zero" or "torn".
    """

    names: str | int | float
    data: str


class Model:
    """Follows operations one by one; `crash` shows a disk after any of them."""

    def __init__(self, base: Image) -> None:
        self._nodes = 0
        self._files: dict[int, _File] = {}
        # Directory -> names in it: durable at the start, and as programs see them now.
        self._base: dict[int, dict[str, int]] = {}
        self._now: dict[int, dict[str, int]] = {}
        self._changes: list[_Change] = []
        self._last: dict[tuple[int, str], int] = {}
        self._unsynced: dict[int, set[int]] = {}  # position -> directories not yet fsynced
        self._open: dict[int, int] = {}  # the recorder's file number -> node
        self._root = self._new_directory()
        for path in sorted(base):
            content = base[path]
            node = self._new_directory() if content is None else self._new_file(content)
            parent, name = self._find_parent(path)
            self._now[parent][name] = node
        self._base = {node: dict(names) for node, names in self._now.items()}

    def apply(self, op: Op) -> None:
        """Take in one operation."""
        if op.kind in ("mkdir", "create"):
            node = self._new_directory() if op.kind == "mkdir" else self._new_file(b"")
            if op.kind == "create":
                self._open[op.file] = node
            self._change([(*self._find_parent(op.path), node)])
        elif op.kind in ("pwrite", "extend", "cut"):
            data = op.data if op.kind == "pwrite" else None
            edit = _Edit(op.offset, data, is_cut=op.kind == "cut")
            self._files[self._open[op.file]].pending.append(edit)
        elif op.kind == "sync_file":
            file = self._files[self._open[op.file]]
            file.durable, file.pending = _apply(file.durable, file.pending), []
        elif op.kind == "sync_dir":
            if not op.path.startswith(".."):  # what holds the sandbox is not looked at
                self._sync_directory(self._find(op.path))
        elif op.kind == "rename":
            node = self._find(op.path)
            self._change(
                [(*self._find_parent(op.path), None), (*self._find_parent(op.target), node)]
            )
        elif op.kind == "link":
            self._change([(*self._find_parent(op.target), self._find(op.path))])
        elif op.kind in ("unlink", "rmdir"):
            if op.path.rpartition("/")[2] == LOCK:
                return  # nobody recorded how it came: it holds no data
            self._change([(*self._find_parent(op.path), None)])
        elif op.kind != "mark":
            raise AssertionError(f"unknown operation {op}")

    @property
    def pending_names(self) -> list[int]:
        """Positions of the changes of names that may be lost, in order."""
        return sorted(self._unsynced)

    @property
    def has_pending_data(self) -> bool:
        """Whether any file has bytes that may be lost."""
        return any(file.pending for file in self._files.values())

    def seen(self) -> Image:
        """Return the image that programs see now."""
        return self.crash(Choice("all", "all"), None)

    def crash(self, choice: Choice, rng: random.Random | None) -> Image:
        """Return one image that may be on disk if power fails now."""
        kept = self._kept(choice.names, rng)
        names = {node: dict(entries) for node, entries in self._base.items()}
        for position, change in enumerate(self._changes):
            if position in kept:
                for directory, name, node in change.entries:
                    if node is None:
                        names.setdefault(directory, {}).pop(name, None)
                    else:
                        names.setdefault(directory, {})[name] = node
        image: Image = {}
        contents: dict[int, bytes] = {}  # a file with two names is torn once
        self._walk(self._root, "", names, choice.data, rng, image, contents)
        return image

    def _walk(self, directory, prefix, names, data, rng, image, contents) -> None:
        for name, node in names.get(directory, {}).items():
            path = f"{prefix}{name}"
            if node in self._files:
                if node not in contents:
                    contents[node] = _survivor(self._files[node], data, rng)
                image[path] = contents[node]
            else:
                image[path] = None
                self._walk(node, f"{path}/", names, data, rng, image, contents)

    def _kept(self, names: str | int | float, rng: random.Random | None) -> set[int]:
        pending = self.pending_names
        kept = set(range(len(self._changes))) - set(pending)
        if names == "all":
            return kept | set(pending)
        if names == "none":
            return kept
        if isinstance(names, int):
            return kept | set(pending[:names])
        assert rng is not None
        for position in pending:
            # In order of time, so that all it needs was decided before.
            if rng.random() < names and self._changes[position].needs <= kept:
                kept.add(position)
        return kept

    def _change(self, entries: list[tuple[int, str, int | None]]) -> None:
        position = len(self._changes)
        keys = [(directory, name) for directory, name, _ in entries]
        needs = frozenset(self._last[key] for key in keys if key in self._last)
        directories = frozenset(directory for directory, _ in keys)
        self._changes.append(_Change(tuple(entries), needs, directories))
        self._unsynced[position] = set(directories)
        for directory, name, node in entries:
            self._last[directory, name] = position
            if node is None:
                del self._now[directory][name]
            else:
                self._now[directory][name] = node

    def _sync_directory(self, directory: int) -> None:
        for position, missing in list(self._unsynced.items()):
            missing.discard(directory)
            if not missing:
                del self._unsynced[position]

    def _new_directory(self) -> int:
        self._nodes += 1
        self._now[self._nodes] = {}
        return self._nodes

    def _new_file(self, content: bytes) -> int:
        self._nodes += 1
        self._files[self._nodes] = _File(content)
        return self._nodes

    def _find(self, path: str) -> int:
        node = self._root
        for name in path.split("/"):
            if name != ".":
                node = self._now[node][name]
        return node

    def _find_parent(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        return self._find(parent or "."), name


def _apply(content: bytes, edits: Iterable[_Edit]) -> bytes:
    result = bytearray(content)
    for edit in edits:
        if edit.is_cut:
            del result[edit.offset :]
        result.extend(bytes(max(0, _reach(edit) - len(result))))
        if edit.data is not None:
            result[edit.offset : _reach(edit)] = edit.data
    return bytes(result)


def _survivor(file: _File, data: str, rng: random.Random | None) -> bytes:
    if not file.pending or data == "all":
        return _apply(file.durable, file.pending)
    if data == "none":
        return file.durable
    if data == "zero":
        return _apply(file.durable, [_zeros(edit) for edit in file.pending])
    assert rng is not None
    kept = [piece for edit in file.pending for piece in _pieces(edit) if rng.random() < 0.5]
    # What is lost is a hole of zeros, or lies beyond the end of the file.
    longest = max(_reach(edit) for edit in file.pending)
    result = _apply(file.durable, kept).ljust(longest, b"\0")
    if rng.random() < 0.5:
        length = rng.randrange(0, len(result) + PIECE, PIECE)
        result = result[: max(length, len(file.durable))]
    return result


def _zeros(edit: _Edit) -> _Edit:
    return replace(edit, data=None if edit.data is None else bytes(len(edit.data)))


def _reach(edit: _Edit) -> int:
    return edit.offset + len(edit.data or b"")


def _pieces(edit: _Edit) -> Iterator[_Edit]:
    """Cut a write where the pages of the file are; a change of length is one piece."""
    if edit.data is None:
        yield edit
        return
    start = edit.offset
    while start < _reach(edit):
        end = min(_reach(edit), (start // PIECE + 1) * PIECE)
        yield _Edit(start, edit.data[start - edit.offset : end - edit.offset])
        start = end


def crash_images(
    base: Image, ops: Sequence[Op], rng: random.Random, *, samples: int
) -> Iterator[tuple[int, Choice, Image]]:
    """Yield images that a crash may leave, with the number of operations before it.

    All that a journal can leave (names lost in order, bytes whole, missing or zero) come
    for every prefix; ``samples`` more for each prefix are drawn out of order and torn.
    Images may come twice.
    """
    model = Model(base)
    for done in range(len(ops) + 1):
        if done:
            model.apply(ops[done - 1])
        for choice in _choices(model, rng, samples):
            yield done, choice, model.crash(choice, rng)


def _choices(model: Model, rng: random.Random, samples: int) -> Iterator[Choice]:
    pending = len(model.pending_names)
    torn = ("all", "none", "zero", "torn") if model.has_pending_data else ("all",)
    for count in range(pending + 1):
        for data in torn:
            yield Choice(count, data)
    if pending or model.has_pending_data:
        for _ in range(samples):
            yield Choice(rng.choice([0.2, 0.5, 0.8, 0.95]), rng.choice(torn))
