# SPDX-License-Identifier: Apache-2.0
"""Copies the newest local generation to the checkpoint directory, by all its hosts."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import agree, on_root
from mpi_ckpt.engine.hosts.copying.directory_copy import DirectoryCopy, LocalSource
from mpi_ckpt.engine.hosts.kept import find_kept, set_aside_bad
from mpi_ckpt.engine.hosts.level import HostLevel
from mpi_ckpt.engine.hosts.local_settings import Local
from mpi_ckpt.engine.session import Session
from mpi_ckpt.errors import CorruptGenerationError, ReadError, SaveError
from mpi_ckpt.options import Options
from mpi_ckpt.storage.local.lineage import read_lineage, write_lineage

if TYPE_CHECKING:
    from os import PathLike

    from mpi4py import MPI

    from mpi_ckpt.engine.hosts.kept import KeptGeneration


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
            if kept is None or kept.is_copied:
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
    comm = session.comm
    source = LocalSource(kept.origin, kept.manifest.step, kept.manifest)
    copy = DirectoryCopy(session, source)
    session.directory.goes_on = True  # what is copied goes on from what is there

    def publish() -> dict[str, Any]:
        manifest, path, _ = copy.publish()
        _settle(session, manifest.generation)
        nbytes = sum(file.nbytes for file in manifest.files)
        number, step = manifest.generation, manifest.step
        return {"generation": number, "path": str(path), "step": step, "nbytes": nbytes}

    copy.begin()
    try:
        agree(comm, "copying a local generation", copy.copy, error=SaveError)
        facts: dict[str, Any] = on_root(comm, "publishing", publish, error=SaveError)
    except BaseException:
        copy.drop()
        raise
    return facts


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
