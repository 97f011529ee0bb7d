# SPDX-License-Identifier: Apache-2.0
"""Writes a generation beside the others, then publishes it by one rename.

The order of operations is the promise (docs/guarantees.md): every file is fsynced before
the manifest is written; the manifest and the directory are fsynced before the rename; the
parent is fsynced before the save is acknowledged.
"""

from __future__ import annotations

import io
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from mpi_ckpt.errors import (
    CheckpointError,
    FencedError,
    PublishError,
    WriteError,
)
from mpi_ckpt.leaves.digest import split_blocks
from mpi_ckpt.memory import Arena
from mpi_ckpt.reports import Progress
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import in_words, os_errors_as
from mpi_ckpt.storage.format.layout import MANIFEST, generation_name, partial_name
from mpi_ckpt.storage.writing.outfile import OutStream, create_out_file
from mpi_ckpt.storage.writing.space import require_space, require_visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from mpi_ckpt.leaves.digest import Digest
    from mpi_ckpt.storage.writing.outfile import IOMode, OutFile

_STREAM_BUFFER_BYTES = 1 << 20
_COUNTED_BYTES = 64 << 20
_COPY_BYTES = 16 << 20
_ZEROS_BYTES = 1 << 20


class Partial:
    """A generation that is being written. Used by one thread.

    Args:
        root: The checkpoint directory; the caller holds its lock.
        generation: Its number after publication.
        job: Name of the job.
        mode: How files are written; see `create_out_file`.
        staging: Memory for direct writes, kept by the caller from save to save.
        joined: Whether root of the job has made it, and this rank is another writer, which
            writes its own files into it.
        check: Raises `FencedError` if another job has taken over the directory. Called
            before the commit point, and after any failure: a successor deletes partials,
            and a job that is cut off should report that.
        sync_names: Whether directories must be fsynced; if not, they are if possible.

    Attributes:
        progress: Counts the bytes of leaves and tiles.

    Raises:
        WriteError: On the calling rank, if its directory cannot be made, or does not exist.
        FencedError: On the calling rank, here and from every method that writes, if
            ``check`` does.
    """

    def __init__(
        self,
        root: Path,
        generation: int,
        job: str,
        *,
        mode: IOMode = "auto",
        staging: Arena | None = None,
        joined: bool = False,
        check: Callable[[], None] | None = None,
        sync_names: bool = True,
    ) -> None:
        self._root = root
        self._check, self._sync_names = check or (lambda: None), sync_names
        self._mode: IOMode = mode
        self._staging = staging or Arena(huge_pages=True)
        self.generation = generation
        self.path = root / partial_name(generation, job)
        self.progress = Progress()
        self.bytes_written = 0
        self._was_named = False
        self._joined = joined
        if joined:
            with self._errors_as(WriteError, "joining", self.path):
                require_visible(self.path)
        else:
            with self._errors_as(WriteError, "making", self.path):
                filesystem.make_directory(self.path)

    def require_space(self, nbytes: int, files: int) -> None:
        """Refuse to begin a generation that does not fit. Not collective.

        Args:
            nbytes: Lower bound of the bytes to write, by all ranks.
            files: Lower bound of the number of files to make.

        Raises:
            WriteError: On the calling rank; the partial must then be dropped.
        """
        require_space(self.path, self._root, nbytes=nbytes, files=files)

    def write_shard(
        self, name: str, runs: Iterable[memoryview], nbytes: int, *, kept: bool = False
    ) -> None:
        """Write runs of bytes, one after the other, as one durable file.

        Not collective.

        Args:
            name: Name of the file.
            runs: The runs; each is used up before the next is requested.
            nbytes: Their total length.
            kept: Whether the bytes of all runs stay unchanged until this returns.

        Raises:
            WriteError: On the calling rank; the partial must then be dropped.
        """
        with self._sized_file(name, nbytes) as out:
            self._append(out, runs, kept=kept)
            out.finish()

    def write_headed(
        self,
        name: str,
        header_bytes: int,
        runs: Iterable[memoryview],
        header: Callable[[], bytes],
        nbytes: int,
        *,
        kept: bool = False,
    ) -> None:
        """Write runs of bytes behind a header that is known last, as one durable file.

        Not collective.

        Args:
            name: Name of the file.
            header_bytes: Length of the header in bytes, a multiple of 4096.
            runs: The runs; each is used up before the next is requested.
            header: Called once, after the last run; returns the header.
            nbytes: Length of header and runs in bytes.
            kept: Whether the bytes of all runs stay unchanged until this returns.

        Raises:
            WriteError: On the calling rank; the partial must then be dropped.
        """
        zeros = memoryview(bytes(min(header_bytes, _ZEROS_BYTES)))
        with self._sized_file(name, nbytes) as out:
            for start in range(0, header_bytes, _ZEROS_BYTES):
                out.write(zeros[: header_bytes - start])
            self._append(out, runs, kept=kept)
            # CRASH: up to here the file has zeros in place of its header. Nobody reads it:
            # the rename that publishes comes after this file's only fsync.
            descriptor = out.settle()
            text = header()
            assert len(text) == header_bytes
            filesystem.write_all(descriptor, text, 0)
            out.finish()

    def write_stream(
        self, name: str, save: Callable[[BinaryIO], None]
    ) -> tuple[int, Digest]:
        """Let a function write a durable file, in any order; digest its contents.

        Not collective.

        Returns:
            Size in bytes and digest.

        Raises:
            WriteError: On the calling rank; the partial must then be dropped.
        """
        with self._file(name, None) as out:
            raw = OutStream(self.path / name, out)
            with io.BufferedRandom(raw, _STREAM_BUFFER_BYTES) as fileobj:
                save(fileobj)
            digest = raw.finish()
        self.bytes_written += raw.nbytes
        return raw.nbytes, digest

    def carry(self, source: Path, name: str, *, copy: bool) -> bool:
        """Share a file of an older generation by hard link.

        Not collective.

        Args:
            source: The file.
            name: Its name in this generation.
            copy: Whether to copy it if links are refused.

        Returns:
            False if links are refused and it was not copied.

        Raises:
            WriteError: On the calling rank; the partial must then be dropped.
        """
        with self._errors_as(WriteError, "sharing", source):
            try:
                filesystem.link_file(source, self.path / name)
            except OSError:
                if not copy:
                    return False
                self._copy(source, name)
        return True

    def publish(self, manifest: bytes) -> Path:
        """Write the manifest and make the generation exist. Not collective.

        Returns:
            The directory under its final name, which is durable.

        Raises:
            SaveError: On the calling rank, as in `seal` and `appear`.
        """
        self.seal(manifest)
        return self.appear()

    def seal(self, manifest: bytes) -> None:
        """Write the manifest, and make all names durable. Not collective. May raise."""
        with self._file(MANIFEST, len(manifest)) as out:
            out.write(memoryview(manifest))
            out.finish()
        self.bytes_written += len(manifest)
        with self._errors_as(PublishError, "publishing", self.path):
            # CRASH: the bytes of all files are durable; this makes their names durable.
            self._sync(self.path)

    def appear(self) -> Path:
        """Make the sealed generation exist. Not collective.

        Raises:
            PublishError: On the calling rank; nothing was published.
        """
        target = self._root / generation_name(self.generation)
        with self._errors_as(PublishError, "publishing", self.path):
            # INVARIANT: a successor first signs the lock, then sweeps. If it swept before
            # this partial was made, this check sees its name; if it sweeps later, the
            # rename below finds nothing to rename, or comes first and the successor sees
            # it.
            self._check()
            # CRASH: before this rename the generation does not exist; everything it
            # needs is durable, so after it the generation is whole.
            filesystem.rename_new(self.path, target)
            # CRASH: until this fsync a power cut may undo the rename, so nobody may hear of
            # the generation before.
            try:
                self._sync(self._root)
            except OSError as cause:
                self._withdraw(target, cause)
                raise
        return target

    def drop(self) -> None:
        """Delete the partial; a later sweep deletes what remains.

        Not collective.
        """
        if not self._was_named:
            with suppress(OSError):
                filesystem.remove_tree(self.path)

    def _sync(self, directory: Path) -> None:
        filesystem.sync_directory(directory, if_possible=not self._sync_names)

    def _withdraw(self, target: Path, cause: OSError) -> None:
        # It is unknown whether the name is durable. Withdraw it, so that a restart finds
        # what the error says ("nothing was published").
        # CRASH: the files must not vanish before the name is durably gone, and the fsync of
        # the directory has just failed: a sweep deletes them, after it has fsynced the
        # directory.
        self._was_named = True
        self._check()  # a successor may already have continued from it
        try:
            filesystem.rename_new(target, self.path)
        except OSError as failure:
            raise PublishError(
                f"making {target} durable failed: {in_words(cause)}; its name could not be "
                f"taken back: {in_words(failure)}. It is whole, and a restart may find it",
                path=target,
                errno=cause.errno,
            ) from cause

    @contextmanager
    def _errors_as(
        self, error: type[CheckpointError], doing: str, path: Path
    ) -> Iterator[None]:
        try:
            with os_errors_as(error, doing, path):
                yield
        except error as failure:
            try:
                self._check()
            except FencedError as fenced:
                raise fenced from failure
            except CheckpointError:
                pass  # the lock cannot be read either: the first failure is reported
            raise

    @contextmanager
    def _sized_file(self, name: str, nbytes: int) -> Iterator[OutFile]:
        """Create a file of a rank's own; the writer calls its ``finish`` in the block."""
        # Check again, now with the exact size, and on the host that writes.
        require_space(self.path, self.path / name, nbytes=nbytes, files=1)
        self.progress.expect(nbytes)
        with self._file(name, nbytes) as out:
            yield out
        if self._joined:
            # CRASH: root fsyncs the directory too, but on some network file systems only
            # the host that made an entry can make it durable.
            with self._errors_as(WriteError, "writing", self.path):
                self._sync(self.path)
        self.bytes_written += nbytes

    def _append(self, out: OutFile, runs: Iterable[memoryview], *, kept: bool) -> None:
        write = out.write_kept if kept else out.write
        for piece in (piece for run in runs for piece in split_blocks(run, _COUNTED_BYTES)):
            write(piece)
            self.progress.count(len(piece))

    @contextmanager
    def _file(self, name: str, nbytes: int | None) -> Iterator[OutFile]:
        """Create a file; the writer calls its ``finish`` within the block."""
        path, mode = self.path / name, self._mode
        with (
            self._errors_as(WriteError, "writing", path),
            create_out_file(path, nbytes=nbytes, mode=mode, staging=self._staging) as out,
        ):
            yield out

    def _copy(self, source: Path, name: str) -> None:
        with filesystem.open_for_reading(source) as (reader, nbytes), ExitStack() as stack:
            require_space(self.path, self.path / name, nbytes=nbytes, files=1)
            out = stack.enter_context(self._file(name, nbytes))
            window = memoryview(bytearray(min(_COPY_BYTES, nbytes)))
            for offset in range(0, nbytes, _COPY_BYTES):
                count = filesystem.read_at(reader, window, offset)
                out.write(window[:count])
            out.finish()
        self.bytes_written += nbytes
