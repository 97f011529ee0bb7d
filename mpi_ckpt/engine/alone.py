# SPDX-License-Identifier: Apache-2.0
"""One state in a directory of its own, written and read by one process. No MPI."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from mpi_ckpt.engine.contents import capture_only
from mpi_ckpt.engine.draft import SaveRequest
from mpi_ckpt.engine.targets import Target
from mpi_ckpt.engine.write import write_generation
from mpi_ckpt.errors import CorruptGenerationError, NoCheckpointError, SaveError
from mpi_ckpt.options import Options
from mpi_ckpt.reports import PhaseClock
from mpi_ckpt.retention import KeepLast
from mpi_ckpt.storage import filesystem, recovery
from mpi_ckpt.storage.directory import CheckpointDirectory
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.layout import (
    LOCK,
    QUARANTINE,
    generation_name,
    generation_number,
    is_partial_name,
)
from mpi_ckpt.storage.reader import GenerationReader

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.state import LeafState
    from mpi_ckpt.storage.manifest import StoredState

__all__ = ["load_alone", "remove_alone", "save_alone"]


def save_alone(path: Path, state: LeafState, step: int) -> None:
    """Write a state as the one generation of a directory; replace an older one.

    Not collective. Main thread only. Durable when it returns.

    Args:
        path: The directory; made if it is missing.
        state: What to save.
        step: Training step to note.

    Raises:
        SaveError: On the calling rank; what was there before is untouched.
    """
    options = Options(retention=KeepLast(1), reuse=False)
    with closing(CheckpointDirectory(path, options.io)) as directory:
        directory.own()
        request = SaveRequest(states=capture_only([state]), step=step, size=1)
        published = write_generation(directory, request, options, PhaseClock())
        directory.remove(published.retired)


def load_alone(path: Path, state: LeafState) -> None:
    """Read a state that `save_alone` has written, every byte proven.

    Not collective. Takes no lock, so any number of ranks may read at a time.

    Args:
        path: The directory.
        state: Filled from it.

    Raises:
        NoCheckpointError: On the calling rank, if there is nothing.
        CorruptGenerationError: On the calling rank, if none of its generations is good.
        RestoreError: On the calling rank, for anything else that went wrong.
    """
    problems = []
    for number in recovery.survey(path).generations:
        try:
            with GenerationReader(path / generation_name(number)) as reader:
                _read(reader, state)
                return
        except CorruptGenerationError as problem:
            problems.append(str(problem))
    if problems:
        raise CorruptGenerationError(
            f"nothing in {path} is good: {'; '.join(problems)}",
            path=path,
            problems=problems,
        )
    raise NoCheckpointError(f"{path} holds no generation", path=path)


def remove_alone(path: Path) -> None:
    """Delete a directory that `save_alone` has written. Not collective.

    Raises:
        SaveError: On the calling rank, if it holds anything else, or cannot be deleted.
    """
    with os_errors_as(SaveError, "removing", path):
        try:
            names = filesystem.list_names(path)
        except FileNotFoundError:
            return
        foreign = [name for name in names if not _is_ours(name)]
        if foreign:
            raise SaveError(
                f"{path} is not removed: it holds {foreign}, which is not of our making",
                path=path,
            )
        for name in names:
            filesystem.remove_tree(path / name)
        filesystem.remove_tree(path)


def _read(reader: GenerationReader, state: LeafState) -> None:
    stored = {one.name: one for one in reader.manifest.states}
    if set(stored) != {state.name}:
        raise NoCheckpointError(
            f"{reader.path} holds {sorted(stored)}, not one {state.name!r}: it was saved "
            "by a manager, which can restore it",
            path=reader.path,
        )
    _fill(reader, stored[state.name], state)


def _fill(reader: GenerationReader, stored: StoredState, state: LeafState) -> None:
    specs = [leaf.spec for leaf in stored.leaves]
    arrival = state.prepare(stored.structure, specs, strict=True)
    for leaf, target in zip(stored.leaves, arrival.leaves, strict=True):
        if target is None:
            continue
        arriving = Target(target.buffer, leaf.extent.nbytes)
        room = arriving.memory()
        start = 0
        for block in range(len(leaf.extent.digest.blocks)):
            piece = reader.read_block(leaf.extent, block)
            room[start : start + len(piece)] = piece
            start += len(piece)
        arriving.finish()
    arrival.adopt()


def _is_ours(name: str) -> bool:
    return (
        name in (LOCK, QUARANTINE)
        or generation_number(name) is not None
        or is_partial_name(name)
    )
