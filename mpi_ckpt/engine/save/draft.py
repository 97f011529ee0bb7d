# SPDX-License-Identifier: Apache-2.0
"""Makes a generation on root, from its beginning to its publication. No MPI."""

from __future__ import annotations

import logging
import operator
import time
from io import UnsupportedOperation
from typing import TYPE_CHECKING, BinaryIO

from mpi_ckpt.engine.save.request import Published, SaveRequest, foresee_space
from mpi_ckpt.engine.save.reuse import SharedLeaves, has_unchanged, plan_reuse, sample
from mpi_ckpt.engine.save.shard import with_digests, write_shard
from mpi_ckpt.engine.sync.captured import CapturedState, digest_states, pick_leaves
from mpi_ckpt.errors import RestoreError, SaveError, StageError, WriteError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.options import ROOT
from mpi_ckpt.storage.faults import read_errors_as_save_errors
from mpi_ckpt.storage.format.layout import (
    carried_file_name,
    generation_name,
    shard_file_name,
    stream_file_name,
)
from mpi_ckpt.storage.format.manifest import (
    Extent,
    Manifest,
    StoredFile,
    StoredLeaves,
    StoredState,
)
from mpi_ckpt.storage.format.manifest_codec import MANIFEST_BYTES_MAX, encode, largest_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.engine.save.cut.own_tiles import TileFiles
    from mpi_ckpt.engine.save.reuse import KnownLeaves
    from mpi_ckpt.engine.save.shard import Shard, ShardImage
    from mpi_ckpt.options import Options
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.directory import CheckpointDirectory
    from mpi_ckpt.storage.writing.partial import Partial

logger = logging.getLogger(__name__)

_NO_HEADER = digest_bytes(b"")

# Above this size, a sample of leaves is digested first.
_SAMPLED_BYTES_MIN, _SAMPLES = 64 << 20, 8

# Early enough for the user to change the states before saves start to fail.
_WARNED_BYTES = MANIFEST_BYTES_MAX // 4


class Draft:
    """A generation that root is making: `begin` starts it, `publish` makes it exist.

    Not collective. A context manager, which drops the draft on any failure. `begin` shares
    the unchanged leaves of older generations; root alone, or several ranks, write the rest.

    Attributes:
        partial: The directory that receives the files.
        captured: The contents of the leaf states.
        fresh: For each of them, the indices of the leaves that must be written.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        request: SaveRequest,
        options: Options,
        partial: Partial,
        captured: Sequence[CapturedState],
        shared: SharedLeaves,
    ) -> None:
        self._directory = directory
        self._request = request
        self._options = options
        self._shared = shared
        self._shards: list[Shard] = []
        self._streams: list[StoredState] = []
        self._stream_files: list[StoredFile] = []
        self.partial = partial
        self.captured = captured
        self.fresh = [shared.others(n, len(one.leaves)) for n, one in enumerate(captured)]

    @classmethod
    def begin(
        cls,
        directory: CheckpointDirectory,
        request: SaveRequest,
        options: Options,
        *,
        tile_bytes: int = 0,
        known: KnownLeaves | None = None,
    ) -> Draft:
        """Make the directory of a generation, share unchanged leaves, check the free space.

        Args:
            directory: The directory, owned by this job.
            request: What to save.
            options: They define what is shared with older generations, and which of those
                may be removed; nothing is removed here.
            tile_bytes: Bytes of the tiles that all ranks will write.
            known: Fingerprints of what the newest generation holds.

        Raises:
            SaveError: On the calling rank; no files are left behind. A WriteError with
                ENOSPC if the file system lacks the space.
        """
        partial = directory.begin()
        try:
            captured: Sequence[CapturedState] = request.captured
            if options.io.reuse:
                captured = _digest_unknown(partial, directory, captured, options, known)
            shared = _link_unchanged(partial, directory, request, captured, options, known)
            draft = cls(directory, request, options, partial, captured, shared)
            needed = foresee_space(captured, draft.fresh, request.plain)
            partial.require_space(needed.nbytes + tile_bytes, needed.files)
        except BaseException:
            _drop(partial, directory)
            raise
        return draft

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Whatever the exception, no half-written generation stays.
        if kind is not None:
            self.drop()

    def drop(self) -> None:
        """Remove the partial, if any. Not collective. Callable twice."""
        _drop(self.partial, self._directory)

    @property
    def fresh_states(self) -> list[CapturedState]:
        """The leaves that must be written, by state."""
        return [pick_leaves(*pair) for pair in zip(self.captured, self.fresh, strict=True)]

    def write(
        self,
        captured: Sequence[CapturedState],
        plain: Sequence[State],
        image: ShardImage | None = None,
    ) -> None:
        """Write root's share: the streams of plain states, and one file of leaves.

        Args:
            captured: The leaves.
            plain: The plain states.
            image: As for `write_shard`.

        Raises:
            SaveError: On the calling rank.
        """
        for state in plain:
            self._write_stream(state)
        shard = write_shard(self.partial, captured, shard_file_name(ROOT), image)
        if shard is not None:
            self._shards.append(shard)

    def digested(self) -> list[CapturedState]:
        """Return the contents with all digests. Root alone has written them."""
        return [with_digests(content, self._shards) for content in self.captured]

    def publish(
        self, others: Sequence[Shard] = (), tiles: TileFiles | None = None
    ) -> Published:
        """Make the generation exist.

        Args:
            others: The files of leaves that other ranks have written, which are durable.
            tiles: The files of tiles that all ranks have written, which are durable.

        Raises:
            SaveError: On the calling rank; nothing was published.
        """
        manifest = self._complete([*self._shards, *others], tiles)
        theirs = sum(shard.file.nbytes for shard in others)
        encoded = encode(manifest)
        if len(encoded) > _WARNED_BYTES:
            self._check_size(manifest, len(encoded))
        path, catalog = self.partial.publish(encoded), self._directory.catalog
        self._directory.note_published(manifest, path, len(encoded))
        retired = catalog.choose(self._options.retention)
        return Published(
            generation=manifest.generation,
            path=path,
            bytes_written=self.partial.bytes_written
            + theirs
            + (tiles.theirs if tiles else 0),
            bytes_reused=manifest.bytes_reused + (tiles.reused if tiles else 0),
            retired=retired,
            kept=catalog.count - len(retired),
            metrics=manifest.metrics,
        )

    def _check_size(self, manifest: Manifest, nbytes: int) -> None:
        name, most = largest_state(manifest)
        advice = (
            f"{most:,} of them are of state {name!r}: keep its many small values in arrays"
        )
        if nbytes > MANIFEST_BYTES_MAX:
            raise SaveError(
                f"the manifest would take {nbytes:,} bytes, at most {MANIFEST_BYTES_MAX:,} "
                f"can be read; nothing was published. {advice}"
            )
        if not self._directory.has_warned_of_size:
            self._directory.has_warned_of_size = True
            logger.warning(
                "the manifest takes %s bytes, and a save of more than %s is refused; %s",
                *(f"{nbytes:,}", f"{MANIFEST_BYTES_MAX:,}", advice),
            )

    def _complete(self, shards: Sequence[Shard], tiles: TileFiles | None) -> Manifest:
        request = self._request
        states = {state.name: state for state in self._streams}
        for index, content in enumerate(self.captured):
            name, shared = content.name, self._shared.leaves.get(index)
            parts = [shard.states[name] for shard in shards if name in shard.states]
            parts += [] if shared is None else [shared]
            leaves = StoredLeaves.joined(content.form, parts)
            cut = tiles.leaves.get(name, ()) if tiles else ()
            files = tiles.names.get(name, ()) if tiles else ()
            states[name] = StoredState(
                name, content.structure, leaves, cut=cut, files=files
            )
        return Manifest(
            generation=self.partial.generation,
            step=operator.index(request.step),
            time=time.time(),
            job=self._directory.job,
            size=request.size,
            metrics={name: float(value) for name, value in request.metrics.items()},
            files=(
                *self._shared.files.values(),
                *self._stream_files,
                *(shard.file for shard in shards),
                *(tiles.all if tiles else ()),
            ),
            states=(
                *(states[state.name] for state in request.states),
                *self._shared.states,
            ),
        )

    def _write_stream(self, state: State) -> None:
        name = stream_file_name(state.name)

        def save(fileobj: BinaryIO) -> None:
            try:
                state.save(fileobj)
            except Exception as error:
                if isinstance(error, OSError) and not isinstance(
                    error, UnsupportedOperation
                ):
                    raise  # errors of the disk are reported as such
                raise StageError(f"save() of state {state.name!r}: {error!r}") from error

        nbytes, digest = self.partial.write_stream(name, save)
        file = StoredFile(name, nbytes, 0, _NO_HEADER, self.partial.generation)
        self._stream_files.append(file)
        extent = Extent(name, 0, nbytes)
        self._streams.append(StoredState.of_stream(state.name, extent, digest))


def _drop(partial: Partial, directory: CheckpointDirectory) -> None:
    partial.drop()
    # Someone may have removed the newest generation: look again next time.
    directory.forget_newest()


def _digest_unknown(
    partial: Partial,
    directory: CheckpointDirectory,
    captured: Sequence[CapturedState],
    options: Options,
    known: KnownLeaves | None,
) -> Sequence[CapturedState]:
    """Digest leaves that may be shared, unless fingerprints say which are unchanged."""
    older = _newest(directory, needed=False) if known and known.states else None
    if known is None or older is None:
        return _digest_ahead(partial, directory, captured, options)
    is_known = [known.unchanged(older, content) is not None for content in captured]
    rest = [one for one, is_one in zip(captured, is_known, strict=True) if not is_one]
    digested = iter(_digest_ahead(partial, directory, rest, options))
    pairs = zip(captured, is_known, strict=True)
    return [one if is_one else next(digested) for one, is_one in pairs]


def _digest_ahead(
    partial: Partial,
    directory: CheckpointDirectory,
    captured: Sequence[CapturedState],
    options: Options,
) -> Sequence[CapturedState]:
    """Digest leaves that may be shared; other leaves are digested while they are written.

    A file is shared if half of it is unchanged, and a sample finds some of that half.
    """
    threads = options.io.digest_threads
    undigested = [content for content in captured if content.digests is None]
    nbytes = sum(content.form.nbytes for content in undigested)
    if nbytes >= _SAMPLED_BYTES_MIN and _has_room(partial, nbytes):
        older = _newest(directory, needed=False)
        if older is None:
            return captured
        samples = digest_states(sample(undigested, _SAMPLES), threads)
        if not has_unchanged(older, samples):
            return captured
    return digest_states(captured, threads)


def _has_room(partial: Partial, nbytes: int) -> bool:
    # If there is little space, all that can be shared must be shared.
    try:
        partial.require_space(nbytes, 1)
    except WriteError:
        return False
    return True


def _link_unchanged(
    partial: Partial,
    directory: CheckpointDirectory,
    request: SaveRequest,
    captured: Sequence[CapturedState],
    options: Options,
    known: KnownLeaves | None,
) -> SharedLeaves:
    """Share files of the newest generation, and return their places in the new one."""
    carry, reuse = request.carry, options.io.reuse
    if carry is None and not reuse:
        return SharedLeaves()
    with read_errors_as_save_errors():
        older = _newest(directory, needed=carry is not None)
    if older is None:
        return SharedLeaves()
    saved = {state.name for state in request.states}
    others = [state for state in older.states if state.name not in saved]
    carried = [state for state in others if carry is not None and carry(state.name)]
    shared = plan_reuse(
        older,
        captured if reuse else (),
        generation=partial.generation,
        full_every=options.io.full_every,
        carried=carried,
        known=known,
    )
    source = directory.root / generation_name(older.generation)
    needed = {name for state in carried for name in (*state.leaves.files, *state.files)}
    refused = set()
    for name, file in shared.files.items():
        target = carried_file_name(name, file.generation)
        if not partial.carry(source / name, target, copy=name in needed):
            refused.add(name)
    return shared.without_files(refused).renamed(carried_file_name)


def _newest(directory: CheckpointDirectory, *, needed: bool) -> Manifest | None:
    try:
        return directory.newest_manifest()
    except RestoreError as error:
        if needed:
            raise
        # Nothing good to share, but the save can go on.
        logger.info("nothing is shared with older generations: %s", error)
        return None
