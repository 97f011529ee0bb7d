# SPDX-License-Identifier: Apache-2.0
"""A small directory of two generations to be spoilt, and the program that saved them."""

from __future__ import annotations

import json
import os
import shutil
import socket
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from mpi_ckpt import ArrayState, CheckpointManager, ObjectState, Options
from mpi_ckpt.leaves.digest import digest_bytes
from tests.making import Stream, document_of, publish, sealed, sealed_document

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mpi_ckpt import RestoreReport

MANIFEST = "manifest.json"
SHARD = "rank-00000.safetensors"
STREAM = "plain.bin"
NEWEST = "checkpoint-00000002"
MARKER = "code-was-run"


class Program:
    """The states of a program; what they hold tells which generation they are of."""

    def __init__(self, number: int = 0) -> None:
        self.arrays = ArrayState(
            "arrays",
            {
                "wide": np.full((2, 3), number, np.float64),
                "narrow": np.full(4, number, "i1"),
            },
        )
        self.object = ObjectState("object", {"epoch": number, "seen": np.full(3, number)})
        self.plain = Stream("plain", bytes([number]) * 40)

    @property
    def states(self) -> list:
        return [self.arrays, self.object, self.plain]

    @property
    def holds(self) -> int:
        """The one generation whose contents all states hold."""
        (number,) = {
            *self.arrays.arrays["wide"].ravel().tolist(),
            *self.arrays.arrays["narrow"].tolist(),
            self.object.value["epoch"],
            *self.object.value["seen"].tolist(),
            *(self.plain.data or b"\xff"),
        }
        return int(number)

    def restore(self, root: Path) -> RestoreReport | None:
        options = Options(preemption_signals=())
        with CheckpointManager(
            root, self.states, comm=MPI.COMM_SELF, options=options
        ) as manager:
            return manager.restore()

    def save(self, root: Path) -> None:
        options = Options(preemption_signals=())
        with CheckpointManager(
            root, self.states, comm=MPI.COMM_SELF, options=options
        ) as manager:
            manager.save(1)


def make_root(root: Path) -> Path:
    """Save two generations; the first is good for ever."""
    for number in (1, 2):
        publish(root, Program(number).states, step=number)
    (root / ".lock").unlink()
    return root


class Payload:
    """Makes a directory when it is unpickled by anything that does."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def change_document(path: Path, change: Callable[[dict], object]) -> None:
    """Change what a manifest says; its own digest is right again."""
    document = document_of(path)
    change(document)
    (path / MANIFEST).write_bytes(sealed_document(document))


def change_text(path: Path, old: str, new: str) -> None:
    """Change the JSON text of a manifest; its own digest is right again."""
    text = json.dumps(document_of(path), separators=(",", ":"))
    assert text.count(old) >= 1, old
    (path / MANIFEST).write_bytes(sealed(text.replace(old, new, 1).encode()[:-1]))


def replace_file(path: Path, data: bytes, *, listed: bool = True) -> None:
    """Put other bytes into a file; if listed, the manifest tells of them."""
    path.unlink()
    path.write_bytes(data)
    if not listed:
        return

    def tell(document: dict) -> None:
        entry = next(file for file in document["files"] if file["name"] == path.name)
        entry["bytes"] = len(data)
        entry["header_bytes"] = min(entry["header_bytes"], len(data))
        entry["header_digest"] = digest_bytes(data[: entry["header_bytes"]]).hex()

    change_document(path.parent, tell)


def leaf_of(document: dict, state: str = "arrays", number: int = 0) -> dict:
    """Return the entry of a leaf, in the manifest."""
    entry = next(stored for stored in document["states"] if stored["name"] == state)
    return entry["leaves"][number]


def stream_of(document: dict) -> dict:
    """Return the extent of the plain state, in the manifest."""
    return next(stored for stored in document["states"] if stored["name"] == "plain")[
        "stream"
    ]


def file_of(document: dict, name: str) -> dict:
    """Return the entry of a file, in the manifest."""
    return next(file for file in document["files"] if file["name"] == name)


def copy_of(root: Path, target: Path) -> Path:
    """Copy a directory as it is, links as links."""
    return shutil.copytree(root, target, symlinks=True)


def make_socket(path: Path) -> None:
    """Make a socket, by its short name: an address takes 107 bytes at most."""
    before = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(before)
