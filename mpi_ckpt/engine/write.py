# SPDX-License-Identifier: Apache-2.0
"""Writes one generation. Root alone, no MPI."""

from __future__ import annotations

import logging
import operator
import time
from dataclasses import dataclass, field
from io import UnsupportedOperation
from typing import TYPE_CHECKING

from mpi_ckpt.digest import Digest, digest_bytes
from mpi_ckpt.engine.contents import Contents, digest_contents
from mpi_ckpt.engine.plan import plan_shard
from mpi_ckpt.engine.reuse import Reuse, plan_reuse, renamed, without_files
from mpi_ckpt.errors import RestoreError, SaveError, StageError
from mpi_ckpt.storage.layout import (
    carried_file_name,
    generation_name,
    shard_file_name,
    stream_file_name,
)
from mpi_ckpt.storage.manifest import (
    Extent,
    Manifest,
    StoredFile,
    StoredLeaf,
    StoredState,
)
from mpi_ckpt.storage.manifest_codec import MANIFEST_BYTES_MAX, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from mpi_ckpt.options import Options
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.retention import RetentionPolicy
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.directory import CheckpointDirectory
    from mpi_ckpt.storage.partial import Partial

__all__ = ["Published", "SaveRequest", "write_generation"]

logger = logging.getLogger(__name__)

_NO_HEADER = digest_bytes(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """What is to be saved.

    Attributes:
        states: Contents of leaf states, and plain states to be streamed, in order.
        step: The training step.
        metrics: The user's metrics.
        size: Number of ranks.
        carry: Tells by name which of the newest generation's other states go along;
            None for none.
    """

    states: Sequence[Contents | State]
    step: int
    size: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    carry: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """A generation that exists and is durable.

    Attributes:
        generation: Its number.
        path: Its directory.
        bytes_written: Bytes written for it.
        bytes_reused: Bytes of leaves that it shares with older generations.
        retired: Older generations that retention now gives up.
    """

    generation: int
    path: Path
    bytes_written: int
    bytes_reused: int
    retired: tuple[int, ...]


def write_generation(
    directory: CheckpointDirectory,
    request: SaveRequest,
    options: Options,
    clock: PhaseClock,
) -> Published:
    """Write a generation and publish it; on any failure leave nothing behind.

    Not collective. Called on root, which owns the directory.

    Args:
        directory: Owned by this job.
        request: What to save; contents must not change meanwhile.
        options: Say what is shared with older generations, and which of them may go;
            nothing is removed here.
        clock: Gets the phases ``write`` and ``publish``.

    Raises:
        SaveError: On the calling rank; nothing was published.
    """
    partial = directory.begin()
    try:
        with clock.phase("write"):
            manifest = _write_files(partial, directory, request, options)
            encoded = encode(manifest)
            if len(encoded) > MANIFEST_BYTES_MAX:
                raise SaveError(
                    f"the manifest would take {len(encoded)} bytes, at most "
                    f"{MANIFEST_BYTES_MAX} can be read; nothing was published"
                )
        with clock.phase("publish"):
            path = partial.publish(encoded)
    # Whatever it was, no half-written generation stays.
    except BaseException:
        partial.drop()
        # The newest generation may be gone, by somebody's hand: look again next time.
        directory.forget_newest()
        raise
    directory.note_published(manifest, path, len(encoded))
    return Published(
        generation=manifest.generation,
        path=path,
        bytes_written=partial.bytes_written,
        bytes_reused=_bytes_reused(manifest),
        retired=_retired(directory, options.retention),
    )


def _bytes_reused(manifest: Manifest) -> int:
    older = {file.name for file in manifest.files if file.generation != manifest.generation}
    return sum(e.nbytes for s in manifest.states for e in s.extents if e.file in older)


def _retired(directory: CheckpointDirectory, retention: RetentionPolicy) -> tuple[int, ...]:
    # The generation is durable: whatever fails from here on must not fail the save.
    try:
        return directory.catalog.choose(retention)
    except Exception:
        logger.exception("retention failed; nothing is removed")
        return ()


def _write_files(
    partial: Partial, directory: CheckpointDirectory, request: SaveRequest, options: Options
) -> Manifest:
    contents = [one for one in request.states if isinstance(one, Contents)]
    plain = [one for one in request.states if not isinstance(one, Contents)]
    if options.reuse:
        contents = digest_contents(contents, options.digest_threads)
    reuse = _link_unchanged(partial, directory, request, contents, options)
    files = list(reuse.files.values())
    states = [_write_stream(partial, state, files) for state in plain]
    states += _write_leaves(partial, contents, reuse, files)
    by_name = {state.name: state for state in states}
    return Manifest(
        generation=partial.generation,
        step=operator.index(request.step),
        time=time.time(),
        job=directory.job,
        size=request.size,
        metrics={name: float(value) for name, value in request.metrics.items()},
        files=tuple(files),
        states=(*(by_name[one.name] for one in request.states), *reuse.states),
    )


def _link_unchanged(
    partial: Partial,
    directory: CheckpointDirectory,
    request: SaveRequest,
    contents: Sequence[Contents],
    options: Options,
) -> Reuse:
    """Share files of the newest generation, and say where in the new one they are."""
    carry = request.carry
    if carry is None and not options.reuse:
        return Reuse()
    older = _newest(directory, needed=carry is not None)
    if older is None:
        return Reuse()
    saved = {one.name for one in request.states}
    others = [state for state in older.states if state.name not in saved]
    carried = [state for state in others if carry is not None and carry(state.name)]
    reuse = plan_reuse(
        older,
        contents if options.reuse else (),
        generation=partial.generation,
        full_every=options.full_every,
        carried=carried,
    )
    source = directory.root / generation_name(older.generation)
    needed = {extent.file for state in carried for extent in state.extents}
    refused = set()
    for name, file in reuse.files.items():
        target = carried_file_name(name, file.generation)
        if not partial.carry(source / name, target, copy=name in needed):
            refused.add(name)
    return renamed(without_files(reuse, refused), carried_file_name)


def _newest(directory: CheckpointDirectory, *, needed: bool) -> Manifest | None:
    try:
        return directory.newest_manifest()
    except RestoreError as error:
        if needed:
            raise
        # Nothing good to share: no reason not to save.
        logger.info("nothing is shared with older generations: %s", error)
        return None


def _write_leaves(
    partial: Partial, contents: Sequence[Contents], reuse: Reuse, files: list[StoredFile]
) -> list[StoredState]:
    """Write the leaves that are not shared, all in one file."""
    fresh = [
        [n for n in range(len(one.leaves)) if (index, n) not in reuse.leaves]
        for index, one in enumerate(contents)
    ]
    extents = dict(reuse.leaves)
    if any(fresh):
        extents.update(_write_shard(partial, contents, fresh, files))
    return [
        StoredState(
            one.name,
            one.structure,
            tuple(
                StoredLeaf(leaf.spec, extents[index, number])
                for number, leaf in enumerate(one.leaves)
            ),
        )
        for index, one in enumerate(contents)
    ]


def _write_shard(
    partial: Partial,
    contents: Sequence[Contents],
    fresh: Sequence[Sequence[int]],
    files: list[StoredFile],
) -> dict[tuple[int, int], Extent]:
    plan = plan_shard(
        [
            (one.name, [one.leaves[n].spec for n in numbers])
            for one, numbers in zip(contents, fresh, strict=True)
        ]
    )
    name = shard_file_name(0)
    extents: dict[tuple[int, int], Extent] = {}

    def runs() -> Iterator[memoryview]:
        yield memoryview(plan.header)
        for place in plan.placements:
            one, number = contents[place.state], fresh[place.state][place.leaf]
            data = one.leaves[number].buffer.read()
            # Where nobody has, it is taken here, while earlier blocks go to disk.
            digest = one.digests[number] if one.digests else Digest.of(data)
            extents[place.state, number] = Extent(name, place.offset, len(data), digest)
            yield data

    partial.write_shard(name, runs(), plan.nbytes)
    header = digest_bytes(plan.header)
    files.append(
        StoredFile(name, plan.nbytes, len(plan.header), header, partial.generation)
    )
    return extents


def _write_stream(partial: Partial, state: State, files: list[StoredFile]) -> StoredState:
    name = stream_file_name(state.name)

    def save(fileobj: BinaryIO) -> None:
        try:
            state.save(fileobj)
        except Exception as error:
            # What the disk refuses is told as such; asking a stream to seek is not that.
            if isinstance(error, OSError) and not isinstance(error, UnsupportedOperation):
                raise
            raise StageError(f"save() of state {state.name!r}: {error!r}") from error

    nbytes, digest = partial.write_stream(name, save)
    files.append(StoredFile(name, nbytes, 0, _NO_HEADER, partial.generation))
    return StoredState(state.name, stream=Extent(name, 0, nbytes, digest))
