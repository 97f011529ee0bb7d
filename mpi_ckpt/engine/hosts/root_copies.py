# SPDX-License-Identifier: Apache-2.0
"""Sends root what its host lacks of a local generation, and what root alone decides on.

The host that has a file proves what it sends. Parts of ranks and tiles need no way through
root: of these root gets the lists only.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm import agree, collect, exchange_messages
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.local.host_directory import HostReader
from mpi_ckpt.storage.reading.proving import proven_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from mpi_ckpt.engine.hosts.kept import KeptGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.storage.format.manifest import Manifest
    from mpi_ckpt.storage.reading.reader import GenerationReader

    Read = Callable[[GenerationReader, Sequence[str]], dict[str, bytes]]

_READING = "reading a local generation"


def bring_to_root(session: Session, kept: KeptGeneration, mine: Collection[str]) -> None:
    """Send root some files that its host lacks, for a comparison that root makes alone.

    Collective. Main thread only.

    Args:
        session: The manager's.
        kept: The generation.
        mine: Names of the files that this rank asks for.

    Raises:
        RestoreError: On every rank, if a host cannot read one, or its bytes are wrong.
    """
    names = collect(
        session.comm,
        _READING,
        lambda: json.dumps(sorted(mine)).encode(),
        lambda parts: sorted({name for part in parts for name in json.loads(part)}),
        error=RestoreError,
    )
    sent = send_to_root(session, kept.manifest, kept.holders, names)
    if isinstance(kept.reader, HostReader):
        kept.reader.add(sent)


def send_to_root(
    session: Session,
    manifest: Manifest,
    holders: Mapping[str, Sequence[int]],
    names: Sequence[str],
) -> dict[str, memoryview]:
    """Send root those of some files that its host lacks.

    Collective. Main thread only.

    Args:
        session: The manager's.
        manifest: The generation's.
        holders: File name -> ranks of the leaders that hold it.
        names: Names of the files.

    Returns:
        Name -> bytes on root; nothing elsewhere.

    Raises:
        RestoreError: On every rank, if a host cannot read one, or its bytes are wrong.
    """
    sizes = {file.name: file.nbytes for file in manifest.files}

    def read(reader: GenerationReader, mine: Sequence[str]) -> dict[str, bytes]:
        leaves = [one for one in reader.leaves() if one.extent.file in mine]
        for _ in proven_blocks(reader, leaves):
            pass
        return {
            name: filesystem.read_start(reader.path / name, sizes[name]) for name in mine
        }

    return _send(session, manifest, holders, {name: sizes[name] for name in names}, read)


def send_headers_to_root(
    session: Session, manifest: Manifest, holders: Mapping[str, Sequence[int]]
) -> dict[str, memoryview]:
    """Send root the headers of the files of tiles that its host lacks.

    Collective. Main thread only. Arguments and errors are those of `send_to_root`.

    Returns:
        Name -> header on root; nothing elsewhere.
    """
    named = {name for state in manifest.states for name in state.files}
    files = {file.name: file for file in manifest.files if file.name in named}

    def read(reader: GenerationReader, mine: Sequence[str]) -> dict[str, bytes]:
        return {name: reader.read_header(files[name]) for name in mine}

    lengths = {name: file.header_bytes for name, file in files.items()}
    return _send(session, manifest, holders, lengths, read)


def _send(
    session: Session,
    manifest: Manifest,
    holders: Mapping[str, Sequence[int]],
    lengths: Mapping[str, int],
    read: Read,
) -> dict[str, memoryview]:
    """Let the first host that has a file read from it, and send that to root."""
    comm = session.comm
    lacking = [name for name in lengths if comm.root not in holders[name]]
    mine = [name for name in lacking if holders[name][0] == comm.rank]
    if not lacking:
        return {}

    def read_here() -> dict[str, bytes]:
        home = None if session.hosts is None else session.hosts.home
        if not mine or home is None:
            return {}
        with home.open(manifest.generation) as reader:
            return read(reader, mine)

    data = agree(comm, _READING, read_here, error=RestoreError)
    sends = [(comm.root, np.frombuffer(data[name], np.uint8)) for name in mine]
    rooms = {name: np.empty(lengths[name], np.uint8) for name in lacking if comm.is_root}
    receives = [(holders[name][0], room) for name, room in rooms.items()]
    exchange_messages(comm, sends, receives, _READING)
    return {name: room.data for name, room in rooms.items()}
