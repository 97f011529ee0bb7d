# SPDX-License-Identifier: Apache-2.0
"""Keeps a generation open for reading; its errors name the other generations."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from mpi_ckpt.errors import CorruptGenerationError, ReadError, RestoreError
from mpi_ckpt.storage.directory.finding import describe_others
from mpi_ckpt.storage.directory.recovery import is_gone

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi_ckpt.storage.directory.catalog import Catalog
    from mpi_ckpt.storage.reading.reader import GenerationReader

Result = TypeVar("Result")


class OpenedGeneration:
    """An open generation of a directory that a job may prune. Not collective.

    Args:
        reader: The open generation.
        catalog: Catalog of its directory.
    """

    def __init__(self, reader: GenerationReader, catalog: Catalog) -> None:
        self._reader = reader
        self._catalog = catalog
        self._closed = False

    def close(self) -> None:
        """Close the files. Callable twice."""
        self._closed = True
        self._reader.close()

    def attempt(self, what: str, work: Callable[[GenerationReader], Result]) -> Result:
        """Return the result of reading. Not collective. Thread-safe.

        Args:
            what: What is read, as the beginning of messages; may be empty.
            work: Reads from the open generation.

        Raises:
            CorruptGenerationError: On the calling rank, if the bytes are not those saved.
            ReadError: On the calling rank, if the operating system cannot read them, or the
                generation was pruned.
            RestoreError: On the calling rank, if it is closed.
        """
        path, number = self._reader.path, self._reader.manifest.generation
        if self._closed:
            raise RestoreError(
                f"{what}{path} is closed; read what you need before close(), or load it "
                "again",
                path=path,
                generation=number,
            )
        try:
            return work(self._reader)
        except (CorruptGenerationError, ReadError) as problem:
            if is_gone(path):
                raise ReadError(
                    f"{what}{path} was pruned, or set aside, since it was loaded, and this "
                    f"was not open yet: load {path.parent} again ({problem})",
                    path=path,
                    generation=number,
                ) from problem
            if isinstance(problem, ReadError):
                raise
            raise CorruptGenerationError(
                f"{what}{problem}. What was read before is good; "
                f"{describe_others(self._catalog, number)}",
                path=problem.path,
                generation=number,
            ) from problem
