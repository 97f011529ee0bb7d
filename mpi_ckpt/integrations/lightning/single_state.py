# SPDX-License-Identifier: Apache-2.0
"""Writes and reads one state in its own directory, by one process. No MPI."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from mpi_ckpt.engine.save.draft import Draft
from mpi_ckpt.engine.save.request import SaveRequest
from mpi_ckpt.engine.sync.captured import capture_states
from mpi_ckpt.errors import (
    CheckpointError,
    CorruptGenerationError,
    NoCheckpointError,
    SaveError,
    StageError,
)
from mpi_ckpt.leaves.target import Target
from mpi_ckpt.options import IO, Options
from mpi_ckpt.retention import KeepLast
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.directory import CheckpointDirectory, recovery
from mpi_ckpt.storage.faults import os_errors_as
from mpi_ckpt.storage.format.layout import (
    LOCK,
    QUARANTINE,
    generation_name,
    generation_number,
    is_partial_name,
    leased_job,
    rolled_back_numbers,
)
from mpi_ckpt.storage.owning.lock import DirectoryLock
from mpi_ckpt.storage.owning.ownership import Ownership
from mpi_ckpt.storage.reading.proving import proven_blocks
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.state import LeafState
    from mpi_ckpt.storage.format.manifest import StoredState

logger = logging.getLogger(__name__)


def save_alone(path: Path, state: LeafState, step: int) -> None:
    """Write a state as the one generation of a directory; replace an older one.

    Not collective. Main thread only. Durable when it returns. At any moment the directory
    does not exist, or holds a complete generation.

    Args:
        path: The directory; made if it is missing.
        state: The state to save.
        step: Training step to note.

    Raises:
        SaveError: On the calling rank; an earlier checkpoint is untouched.
    """
    if os.path.lexists(path):
        _save_into(path, state, step)
        return
    with os_errors_as(SaveError, "making", path.parent):
        filesystem.make_directories(path.parent)
    _sweep_beside(path)
    building = _beside(path)
    try:
        _save_into(building, state, step)
        with os_errors_as(SaveError, "publishing", path):
            # CRASH: before this rename the name does not exist; all contents are durable.
            filesystem.rename_new(building, path)
            filesystem.sync_directory(path.parent, if_possible=True)
    except BaseException:
        with suppress(SaveError, OSError):
            _delete(building)
        raise


def _save_into(path: Path, state: LeafState, step: int) -> None:
    options = Options(retention=KeepLast(1), io=IO(reuse=False))
    # There are no options here: work without whatever the file system lacks.
    ownership = Ownership(locking="either", sync_names=False)
    with closing(CheckpointDirectory(path, ownership=ownership)) as directory:
        directory.own()
        captured = capture_states([state])
        if captured[0].cut:
            raise StageError(
                f"{captured[0].cut[0].spec} is cut over the ranks, and a checkpoint of "
                "Lightning is written by one; save it with a CheckpointManager "
                "(mpi_ckpt.integrations.lightning.MPICheckpoint)"
            )
        request = SaveRequest(states=captured, step=step, size=1)
        with Draft.begin(directory, request, options) as draft:
            draft.write(draft.fresh_states, request.plain)
            published = draft.publish()
        directory.remove(published.retired)


def load_alone(path: Path, state: LeafState) -> None:
    """Read a state that `save_alone` has written, every byte proven.

    Not collective. Takes no lock, so any number of ranks may read at a time.

    Args:
        path: The directory.
        state: The state to fill.

    Raises:
        NoCheckpointError: On the calling rank, if there is no generation.
        CorruptGenerationError: On the calling rank, if none of its generations is good.
        RestoreError: On the calling rank, for any other failure.
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
                f"{path} is not removed: it holds {foreign}, which mpi_ckpt did not write",
                path=path,
            )
        # CRASH: one rename removes the name of the whole; a half-deleted one has no name.
        doomed = _beside(path)
        filesystem.rename_new(path, doomed)
        filesystem.sync_directory(path.parent, if_possible=True)
        _delete(doomed)


def _beside(path: Path) -> Path:
    """Return a new name beside a path, for a directory being made or removed."""
    return path.with_name(f"{_prefix(path)}{secrets.token_hex(6)}")


def _prefix(path: Path) -> str:
    return f".{path.name}.unfinished-"


def _sweep_beside(path: Path) -> None:
    """Delete leftovers of an interrupted save or removal beside a path."""
    with suppress(OSError):
        names = filesystem.list_names(path.parent)
        for name in names:
            if not name.startswith(_prefix(path)):
                continue
            left = path.with_name(name)
            try:
                lock = DirectoryLock(left, "sweep", 0.0, locking="either")
                lock.close()
                _delete(left)
            except (CheckpointError, OSError) as error:  # in use, or already gone
                logger.info("%s is left alone: %s", left, error)


def _delete(path: Path) -> None:
    for name in filesystem.list_names(path):
        filesystem.remove_tree(path / name)
    filesystem.remove_tree(path)


def _read(reader: GenerationReader, state: LeafState) -> None:
    stored = {state.name: state for state in reader.manifest.states}
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
    targets = [Target(spec, leaf) for spec, leaf in zip(specs, arrival.leaves, strict=True)]
    for block, data in proven_blocks(reader, stored.leaves):
        targets[block.leaf].put(block.start, data)
        if block.is_last:
            targets[block.leaf].finish()
    arrival.adopt()


def _is_ours(name: str) -> bool:
    return (
        name in (LOCK, QUARANTINE)
        or generation_number(name) is not None
        or is_partial_name(name)
        or leased_job(name) is not None
        or rolled_back_numbers(name) is not None
    )
