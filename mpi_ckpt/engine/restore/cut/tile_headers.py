# SPDX-License-Identifier: Apache-2.0
"""Reads the headers of files of tiles by all ranks in turn, for root to join.

A file system answers each opening of a file in its time: root alone would wait for that as
often as ranks have saved.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.comm import scatter_parts
from mpi_ckpt.errors import (
    CheckpointError,
    CorruptGenerationError,
    ReadError,
    RestoreError,
)
from mpi_ckpt.options import ROOT
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.format.manifest import StoredFile
from mpi_ckpt.storage.reading.file_reader import FileReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.storage.reading.reader import GenerationReader

_DOING = "sharing out the lists of tiles"
_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class TileHeaders:
    """The headers that one rank has read.

    Attributes:
        encoded: For `join_tile_headers`.
        failure: Why one could not be read here; None if all could.
    """

    encoded: bytes = b""
    failure: CheckpointError | None = None

    def refuse(self) -> None:
        """Raise the failure, since root has found that it is this rank's own.

        Raises:
            ReadError: On the calling rank, if there was any.
        """
        failure = self.failure
        if failure is not None:
            raise ReadError(
                f"{failure}. Root can open it; state that is cut over ranks needs a "
                "directory that all ranks see and may read",
                path=failure.path,
                errno=failure.errno,
            ) from failure


def read_tile_headers(session: Session, found: OpenGeneration) -> TileHeaders:
    """Read and prove this rank's share of the headers.

    Collective. Main thread only. A header that cannot be read here is left to root.

    Args:
        session: The manager's.
        found: The generation, open on root.

    Raises:
        RestoreError: On every rank, if root cannot share them out.
    """
    comm, reader = session.comm, found.reader if session.comm.is_root else None
    unproven = [] if reader is None else reader.unproven
    shares = [
        json.dumps([file.to_json() for file in unproven[rank :: comm.size]]).encode()
        for rank in range(comm.size if comm.is_root else 0)
    ]
    window_bytes = session.options.io.window_bytes
    mine = scatter_parts(
        comm, shares, _DOING, error=RestoreError, window_bytes=window_bytes
    )
    path = session.directory.root / generation_name(found.outline.generation)
    headers: list[bytes | None] = []
    failure: CheckpointError | None = None
    with FileReader(path, found.outline.generation) as files:
        for values in json.loads(mine):
            try:
                header = files.read_header(StoredFile.from_json(values))
                headers.append(header.rstrip(b" "))  # filled up, to align what follows
            except CheckpointError as error:
                headers.append(None)
                failure = error
    lengths = [None if header is None else len(header) for header in headers]
    parts = [json.dumps(lengths).encode(), b"\n", *(one or b"" for one in headers)]
    return TileHeaders(b"".join(parts), failure)


def join_tile_headers(reader: GenerationReader, encoded: Sequence[bytes]) -> bool:
    """Give all headers to root's reader. Not collective. On root.

    Args:
        reader: The open generation.
        encoded: What each rank has read, in rank order.

    Returns:
        Whether root could read all that another rank could not: the fault is that rank's.

    Raises:
        CorruptGenerationError: On the calling rank, if a header is not the saved one, or
            the lists contradict the manifest.
        ReadError: On the calling rank, if root cannot read one either.
    """
    headers: dict[str, bytes] = {}
    is_out_of_sight = False
    for rank, data in enumerate(encoded):
        head, _, body = data.partition(b"\n")
        start = 0
        for file, length in zip(
            reader.unproven[rank :: len(encoded)], json.loads(head), strict=True
        ):
            end = start + (length or 0)
            header = body[start:end].ljust(file.header_bytes)
            headers[file.name], start = header, end
            if length is None:
                # Root's own error is that of a bad generation: then another is tried.
                headers[file.name] = _read_again(reader, file)
                is_out_of_sight = is_out_of_sight or rank != ROOT
    reader.take_headers(headers)
    return is_out_of_sight


def _read_again(reader: GenerationReader, file: StoredFile) -> bytes:
    try:
        return reader.read_header(file)
    except CorruptGenerationError:
        # A network file system may briefly show an old state.
        time.sleep(_PAUSE_SECONDS)
        return reader.read_header(file)
