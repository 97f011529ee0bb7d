# SPDX-License-Identifier: Apache-2.0
"""A generation from its beginning to its publication, as root sees it. No MPI."""

from __future__ import annotations

import logging
import operator
import time
from dataclasses import dataclass, field
from io import UnsupportedOperation
from typing import TYPE_CHECKING

from mpi_ckpt.comm import ROOT
from mpi_ckpt.digest import digest_bytes
from mpi_ckpt.engine.contents import Contents, digest_contents
from mpi_ckpt.engine.needs import foresee_needs
from mpi_ckpt.engine.reuse import (
    Reuse,
    has_unchanged,
    plan_reuse,
    renamed,
    sample,
    without_files,
)
from mpi_ckpt.errors import RestoreError, SaveError, StageError, WriteError
from mpi_ckpt.storage.faults import read_errors_as_save_errors
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
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import BinaryIO

    from mpi_ckpt.engine.shard import Shard
    from mpi_ckpt.engine.stage import Staged
    from mpi_ckpt.options import Options
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.directory import CheckpointDirectory
    from mpi_ckpt.storage.partial import Partial

__all__ = ["Draft", "Published", "SaveRequest"]

logger = logging.getLogger(__name__)

_NO_HEADER = digest_bytes(b"")

# Of more than so many bytes a few leaves are digested before all are.
_SAMPLED_BYTES_MIN = 64 << 20
_SAMPLES = 8


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
        staged: The copies that they are on this rank; None if they are live.
    """

    states: Sequence[Contents | State]
    step: int
    size: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    carry: Callable[[str], bool] | None = None
    staged: Staged | None = None

    @property
    def contents(self) -> list[Contents]:
        """The leaf states."""
        return [one for one in self.states if isinstance(one, Contents)]

    @property
    def plain(self) -> list[State]:
        """The states that write themselves."""
        return [one for one in self.states if not isinstance(one, Contents)]


@dataclass(frozen=True, slots=True)
class Published:
    """A generation that exists and is durable.

    Attributes:
        generation: Its number.
        path: Its directory.
        bytes_written: Bytes written for it, by all ranks.
        bytes_reused: Bytes of leaves that it shares with older generations.
        retired: Older generations that retention now gives up.
    """

    generation: int
    path: Path
    bytes_written: int
    bytes_reused: int
    retired: tuple[int, ...]


class Draft:
    """A generation that root has begun; a context manager that drops it on any failure.

    Not collective. What older generations hold unchanged is shared at once; what is left
    is written by one rank or several; `publish` makes it exist.

    Args:
        directory: Owned by this job.
        request: What to save.
        options: Say what is shared with older generations, and which of them may go;
            nothing is removed here.

    Attributes:
        partial: Where files go.
        contents: What is saved of leaf states.
        fresh: Of each of them, the indices of the leaves that must be written.

    Raises:
        SaveError: On the calling rank; nothing is left behind. A WriteError with ENOSPC
            if the file system has no room for it.
    """

    def __init__(
        self, directory: CheckpointDirectory, request: SaveRequest, options: Options
    ) -> None:
        self._directory = directory
        self._request = request
        self._options = options
        self.contents: Sequence[Contents] = request.contents
        self._streams: list[StoredState] = []
        self._stream_files: list[StoredFile] = []
        self.partial = directory.begin()
        with self:
            if options.reuse:
                self.contents = self._digest_ahead(self.contents)
            self._reuse = _link_unchanged(
                self.partial, directory, request, self.contents, options
            )
            self.fresh = [
                [n for n in range(len(one.leaves)) if (i, n) not in self._reuse.leaves]
                for i, one in enumerate(self.contents)
            ]
            needs = foresee_needs(self.contents, self.fresh, request.plain)
            self.partial.require_space(needs.nbytes, needs.files)

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whatever it was, no half-written generation stays.
        if error is not None:
            self.drop()

    def drop(self) -> None:
        """Leave nothing behind. Not collective. Callable twice."""
        self.partial.drop()
        # The newest generation may be gone, by somebody's hand: look again next time.
        self._directory.forget_newest()

    def write_streams(self, states: Sequence[State]) -> None:
        """Let the plain states write themselves.

        Raises:
            SaveError: On the calling rank.
        """
        for state in states:
            self._write_stream(state)

    def publish(self, shards: Sequence[Shard], clock: PhaseClock) -> Published:
        """Make the generation exist.

        Args:
            shards: The files of leaves that were written; they are durable.
            clock: Gets the phase ``publish``.

        Raises:
            SaveError: On the calling rank; nothing was published.
        """
        with clock.phase("publish"):
            manifest = self._complete(shards)
            encoded = encode(manifest)
            if len(encoded) > MANIFEST_BYTES_MAX:
                raise SaveError(
                    f"the manifest would take {len(encoded)} bytes, at most "
                    f"{MANIFEST_BYTES_MAX} can be read; nothing was published"
                )
            path = self.partial.publish(encoded)
        self._directory.note_published(manifest, path, len(encoded))
        mine = shard_file_name(ROOT)
        others = sum(one.file.nbytes for one in shards if one.file.name != mine)
        return Published(
            generation=manifest.generation,
            path=path,
            bytes_written=self.partial.bytes_written + others,
            bytes_reused=_bytes_reused(manifest),
            retired=self._directory.catalog.choose(self._options.retention),
        )

    def _digest_ahead(self, contents: Sequence[Contents]) -> Sequence[Contents]:
        """Digest what may be shared; where nothing is, digests are taken as it is written.

        A file is shared if half of it is unchanged, and of that a sample finds some.
        """
        threads = self._options.digest_threads
        undigested = [one for one in contents if one.digests is None]
        nbytes = sum(one.form.nbytes for one in undigested)
        if nbytes >= _SAMPLED_BYTES_MIN and self._has_room(nbytes):
            older = _newest(self._directory, needed=False)
            if older is None:
                return contents
            samples = digest_contents(sample(undigested, _SAMPLES), threads)
            if not has_unchanged(older, samples):
                return contents
        return digest_contents(contents, threads)

    def _has_room(self, nbytes: int) -> bool:
        # Where there is little, whatever can be shared must be.
        try:
            self.partial.require_space(nbytes, 1)
        except WriteError:
            return False
        return True

    def _complete(self, shards: Sequence[Shard]) -> Manifest:
        request = self._request
        written = {key: at for shard in shards for key, at in shard.extents.items()}
        states = {state.name: state for state in self._streams}
        for index, one in enumerate(self.contents):
            name, leaves = one.name, []
            for number, spec in enumerate(one.specs):
                extent = self._reuse.leaves.get((index, number))
                leaves.append(StoredLeaf(spec, extent or written[name, spec.name]))
            states[name] = StoredState(name, one.structure, tuple(leaves))
        return Manifest(
            generation=self.partial.generation,
            step=operator.index(request.step),
            time=time.time(),
            job=self._directory.job,
            size=request.size,
            metrics={name: float(value) for name, value in request.metrics.items()},
            files=(
                *self._reuse.files.values(),
                *self._stream_files,
                *(shard.file for shard in shards),
            ),
            states=(*(states[one.name] for one in request.states), *self._reuse.states),
        )

    def _write_stream(self, state: State) -> None:
        name = stream_file_name(state.name)

        def save(fileobj: BinaryIO) -> None:
            try:
                state.save(fileobj)
            except Exception as error:
                # What the disk refuses is told as such; asking a stream to seek is not.
                if isinstance(error, OSError) and not isinstance(
                    error, UnsupportedOperation
                ):
                    raise
                raise StageError(f"save() of state {state.name!r}: {error!r}") from error

        nbytes, digest = self.partial.write_stream(name, save)
        file = StoredFile(name, nbytes, 0, _NO_HEADER, self.partial.generation)
        self._stream_files.append(file)
        stream = Extent(name, 0, nbytes, digest)
        self._streams.append(StoredState(state.name, stream=stream))


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
    with read_errors_as_save_errors():
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


def _bytes_reused(manifest: Manifest) -> int:
    older = {file.name for file in manifest.files if file.generation != manifest.generation}
    return sum(e.nbytes for s in manifest.states for e in s.extents if e.file in older)
