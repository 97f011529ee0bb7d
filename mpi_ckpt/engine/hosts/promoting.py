# SPDX-License-Identifier: Apache-2.0
"""Copies the newest local generation to the checkpoint directory, by all its hosts."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import agree, on_root
from mpi_ckpt.digest import digest_bytes
from mpi_ckpt.engine.hosts.kept import find_kept, set_aside_bad
from mpi_ckpt.engine.hosts.level import HostLevel
from mpi_ckpt.engine.hosts.local_settings import Local
from mpi_ckpt.engine.session import Session
from mpi_ckpt.errors import CorruptGenerationError, ReadError, SaveError
from mpi_ckpt.options import Options
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.format.manifest_codec import encode
from mpi_ckpt.storage.local.lineage import read_lineage, write_lineage
from mpi_ckpt.storage.reading.proving import proven_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from mpi4py import MPI

    from mpi_ckpt.engine.hosts.kept import KeptGeneration
    from mpi_ckpt.storage.format.manifest import Manifest, StoredFile
    from mpi_ckpt.storage.reading.reader import GenerationReader
    from mpi_ckpt.storage.writing.partial import Partial

_COPYING = "copying a local generation"


@dataclass(frozen=True, slots=True)
class Rescued:
    """A local generation that is now in the directory as well; the same on every rank.

    Attributes:
        is_root: Whether this rank is root.
        generation: Its number in the directory; 0 if there was none to copy.
        path: Its directory.
        step: Its training step.
        nbytes: Bytes copied.
        seconds: How long that took.
    """

    is_root: bool
    generation: int = 0
    path: str = ""
    step: int = 0
    nbytes: int = 0
    seconds: float = 0.0


def rescue(
    place: str, directory: str | PathLike[str], comm: MPI.Intracomm | None = None
) -> Rescued:
    """Copy the newest generation that the hosts can complete to the directory.

    Collective. Main thread only. Nothing is copied if the directory has a newer one.

    Args:
        place: Path of the local level, as in `Local`.
        directory: The checkpoint directory, which all hosts see; no job uses it.
        comm: The ranks, at least one on each host; None: all of the job.

    Raises:
        CheckpointError: On every rank; nothing was published.
    """
    level = HostLevel(Local(place))
    session = Session.begin(directory, comm, Options(), None, level)
    with session.let_go_of_if_refused():
        try:
            session.compare_options()
            with session.watch("rescuing"):
                rescued = _rescue(session)
        finally:
            session.directory.close()  # not collective
            level.close()
    session.close()
    return rescued


def _rescue(session: Session) -> Rescued:
    start = time.perf_counter()
    while True:
        bad: CorruptGenerationError | ReadError
        with ExitStack() as stack:
            kept = find_kept(session, (), stack, skips=False, is_partial=False)
            if kept is None:
                return Rescued(session.comm.is_root)
            try:
                facts = _promote(session, kept)
            # The ranks agreed on it: every rank is here, with the same error.
            except (CorruptGenerationError, ReadError) as problem:
                bad = problem
            else:
                seconds = time.perf_counter() - start
                return Rescued(session.comm.is_root, **facts, seconds=seconds)
        if not set_aside_bad(session, kept.manifest.generation, bad):
            raise bad


def _promote(session: Session, kept: KeptGeneration) -> dict[str, Any]:
    """Let each host copy some files into one generation, which root publishes."""
    comm, directory = session.comm, session.directory
    made: list[Partial] = []

    def begin() -> list[Any]:
        directory.own()
        directory.goes_on = True  # what is copied goes on from what is there
        partial = directory.begin()
        made.append(partial)
        nbytes = sum(file.nbytes for file in kept.manifest.files)
        partial.require_space(nbytes, len(kept.manifest.files))
        return [partial.generation, directory.job]

    try:
        number, job = on_root(comm, "beginning a generation", begin, error=SaveError)

        def copy() -> None:
            mine = [file for file in kept.manifest.files if sources[file.name] == comm.rank]
            if mine and kept.reader is not None:
                partial = made[0] if made else directory.join(number, job)
                for file in mine:
                    runs = _proven_runs(kept.reader, file)
                    partial.write_shard(file.name, runs, file.nbytes)

        sources = _sources(kept)
        agree(comm, _COPYING, copy, error=SaveError)

        def publish() -> dict[str, Any]:
            manifest = _of_directory(kept.manifest, number)
            path = made[0].publish(encode(manifest))
            _settle(session, number)
            nbytes = sum(file.nbytes for file in manifest.files)
            step = manifest.step
            return {"generation": number, "path": str(path), "step": step, "nbytes": nbytes}

        facts: dict[str, Any] = on_root(comm, "publishing", publish, error=SaveError)
    except BaseException:
        for partial in made:
            partial.drop()
        raise
    return facts


def _sources(kept: KeptGeneration) -> dict[str, int]:
    """Return for each file the rank that copies it, so that all copy about as much."""
    loads = dict.fromkeys(kept.readers, 0)
    sources = {}
    for file in sorted(kept.manifest.files, key=lambda file: -file.nbytes):
        ranks = kept.holders[file.name]
        source = min(ranks, key=lambda rank: (loads[rank], rank))
        loads[source] += file.nbytes
        sources[file.name] = source
    return sources


def _proven_runs(reader: GenerationReader, file: StoredFile) -> Iterator[memoryview]:
    """Yield the bytes of a file in order, each block once it is proven."""
    if file.header_bytes:
        header = filesystem.read_start(reader.path / file.name, file.header_bytes)
        if digest_bytes(header) != file.header_digest:
            raise CorruptGenerationError(
                f"{reader.path / file.name}: its header does not match its digest",
                path=reader.path / file.name,
                generation=reader.manifest.generation,
            )
        yield memoryview(header)
    leaves = [one for one in reader.leaves() if one.extent.file == file.name]
    leaves.sort(key=lambda leaf: leaf.extent.offset)
    with closing(proven_blocks(reader, leaves)) as blocks:
        for _, data in blocks:
            yield data


def _of_directory(manifest: Manifest, number: int) -> Manifest:
    """Return the manifest of the same states as a generation of the directory."""
    files = tuple([replace(file, generation=number) for file in manifest.files])
    return replace(manifest, generation=number, files=files, local=None)


def _settle(session: Session, number: int) -> None:
    """Note that the directory has all that the last run kept on hosts. On root."""
    directory = session.directory
    lineage = read_lineage(directory.root)
    if lineage is not None and lineage.runs:
        last = replace(lineage.runs[-1], settled=number)
        write_lineage(
            directory.root,
            lineage.with_run(last),
            directory.job,
        )
