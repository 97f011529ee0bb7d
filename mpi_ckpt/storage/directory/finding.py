# SPDX-License-Identifier: Apache-2.0
"""Opens a requested generation, without a lock and without any change.

A job may save and prune at the same time: if a listed generation vanishes before it is
open, the search starts again.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from mpi_ckpt.errors import (
    CorruptGenerationError,
    NoCheckpointError,
    OptionsError,
    ReadError,
    RestoreError,
    UnsupportedFormatError,
)
from mpi_ckpt.storage.directory.recovery import is_gone
from mpi_ckpt.storage.format.layout import (
    MANIFEST,
    QUARANTINE,
    generation_name,
    generation_number,
)
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from mpi_ckpt.choice import Choice
    from mpi_ckpt.retention import GenerationSummary
    from mpi_ckpt.storage.directory.catalog import Catalog
    from mpi_ckpt.storage.directory.recovery import Survey

logger = logging.getLogger(__name__)


_LISTED = 10
_PAUSE_SECONDS = 0.05
_OTHERS = (".pt", ".pth", ".ckpt", ".bin", ".h5", ".npz", ".distcp", ".safetensors")
"""Ends of the names of files in which other programs save a training."""
# Errors that a network file system may briefly return for an existing file.
_PASSING = (errno.ENOENT, errno.ESTALE)


def open_chosen(
    catalog: Catalog, choice: Choice, *, proven: bool = False
) -> GenerationReader:
    """Open the requested generation, and no other in its place.

    Not collective.

    Args:
        catalog: Catalog of the directory.
        choice: The checked request; not the newest.
        proven: Whether to prove all its bytes first.

    Raises:
        NoCheckpointError: On the calling rank, if there is none; the message lists those
            there are.
        CorruptGenerationError: On the calling rank, if it is damaged; the message lists the
            others.
        UnsupportedFormatError: On the calling rank, if it has another format.
        ReadError: On the calling rank, if the operating system cannot read.
    """
    tried = None
    while True:
        number = _number(catalog, choice)
        path = catalog.root / generation_name(number)
        try:
            return _open(path, proven=proven)
        except CorruptGenerationError as problem:
            if not is_gone(path) or number == tried:
                raise CorruptGenerationError(
                    f"{problem}. {choice} was requested, so no other is used instead; "
                    f"{describe_others(catalog, number)}",
                    path=path,
                    generation=number,
                ) from problem
        except ReadError:
            if not is_gone(path) or number == tried:
                raise
        # Listed twice but not there: an old listing must not cause an endless loop.
        tried = number


def open_newest_there(catalog: Catalog) -> GenerationReader:
    """Open the newest generation whose manifest and files look right.

    Not collective. A damaged generation causes a warning and stays in place.

    Raises:
        NoCheckpointError: On the calling rank, if nothing was ever saved there.
        CorruptGenerationError: On the calling rank, if there are generations and none is
            good.
        UnsupportedFormatError: On the calling rank, if the newest has another format.
        ReadError: On the calling rank, if the operating system cannot read.
    """
    root = catalog.root
    refuse_generation(root)
    bad: dict[int, str] = {}  # without generations that are gone
    before = None
    while True:
        found = catalog.look()
        number = next((n for n in found.generations if n not in bad), None)
        if number is None:
            # While its owner renames, a directory may be listed with neither name.
            if found == before:
                break
            before = found
            continue
        path = root / generation_name(number)
        try:
            return open_twice(path)
        except (CorruptGenerationError, ReadError) as problem:
            bad[number] = "" if is_gone(path) else str(problem)
            if bad[number] and isinstance(problem, ReadError):
                raise
            if bad[number]:
                logger.warning("generation %d is not used: %s", number, problem)
    explain_absence(root, found, {n: text for n, text in bad.items() if text})
    raise NoCheckpointError(
        f"{root} holds no generation: is that the directory given to the manager?",
        path=root,
    )


def open_twice(path: Path, *, tiles_later: bool = False) -> GenerationReader:
    """Open a generation; if it looks bad, open it again before believing so.

    Not collective. A network file system that briefly shows an old state must not cause a
    good generation to be quarantined. Arguments are those of `GenerationReader`.

    Raises:
        RestoreError: On the calling rank, as `GenerationReader` does.
    """
    try:
        return GenerationReader(path, tiles_later=tiles_later)
    except (CorruptGenerationError, ReadError) as problem:
        passing = isinstance(problem, CorruptGenerationError) or problem.errno in _PASSING
        if is_gone(path) or not passing:
            raise
        time.sleep(_PAUSE_SECONDS)
    return GenerationReader(path, tiles_later=tiles_later)


def refuse_part(reader: GenerationReader) -> GenerationReader:
    """Return a generation that a job may restore; refuse a host's part of one.

    Not collective.

    Raises:
        UnsupportedFormatError: On the calling rank, for a part of a local generation.
    """
    if reader.manifest.local is None:
        return reader
    reader.close()
    raise UnsupportedFormatError(
        f"{reader.path} is one host's part of a local generation, not a directory to "
        f"restore from: give the manager {reader.manifest.local.directory}, and this place "
        "as local=",
        path=reader.path,
        generation=reader.manifest.generation,
    )


def explain_absence(root: Path, found: Survey, bad: Mapping[int, str]) -> None:
    """Raise if there are or were generations but none is usable; else do nothing.

    Not collective.

    Args:
        root: The directory.
        found: A survey of it.
        bad: Number -> reason, of generations that failed to verify.

    Raises:
        RestoreError: On the calling rank, with the reason why none is usable.
    """
    vanished = [n for n in found.generations if n not in bad]
    if vanished:
        raise ReadError(
            f"{root} lists generations {vanished}, but none of them exists: somebody "
            "deletes them, or this host sees an old listing",
            path=root,
        )
    if bad or found.quarantined:
        named = [*bad.values()] or [
            str(root / QUARANTINE / name) for name in found.quarantined
        ]
        raise CorruptGenerationError(
            f"no generation in {root} is good: {'; '.join(named)}. To start anew, move "
            f"{root / QUARANTINE} and what is left elsewhere{_hint(root, found)}",
            path=root,
            problems=named,
        )
    if found.rolled_back:
        raise CorruptGenerationError(
            f"there is no generation in {root}, but some that a rollback has set aside: "
            f"{', '.join(found.rolled_back)}. To start anew, move them elsewhere"
            f"{_hint(root, found)}",
            path=root,
        )
    if found.unlisted:
        raise CorruptGenerationError(
            f"there is no generation in {root}, and it is not known whether there ever was "
            f"one: {found.unlisted}. To start anew, move that elsewhere",
            path=root / QUARANTINE,
        )
    if found.adaptdl:
        raise UnsupportedFormatError(
            f"{root} holds checkpoints of adaptdl ({', '.join(found.adaptdl)}), or of "
            "another program that gives such names (the Trainer of transformers); they "
            "are not read; to start anew, use another directory or move them away",
            path=root,
        )


def refuse_generation(root: Path) -> None:
    """Refuse a directory that is itself a generation, or holds those set aside.

    Not collective. A restore would find nothing in it, and the training would silently
    begin anew.

    Raises:
        OptionsError: On the calling rank, with the directory to give.
    """
    number = generation_number(root.name)
    # An error counts as no file: listing the directory will report it.
    if number is not None and os.path.isfile(root / MANIFEST):  # noqa: PTH113
        raise OptionsError(
            f"{root} is a generation, and not the directory of generations: give "
            f"{root.parent}; restore(generation={number}) restores this one",
            path=root,
        )
    if root.name == QUARANTINE:
        raise OptionsError(
            f"{root} holds generations of {root.parent} that are damaged or in doubt, and "
            f"is not the directory of a job: give {root.parent}",
            path=root,
        )


def warn_of_other_programs(root: Path) -> None:
    """Warn if a directory without generations holds what others save. Not collective."""
    try:
        names = sorted(path.name for path in root.iterdir())
    except OSError:
        return  # it need not exist
    others = [name for name in names if name.endswith(_OTHERS)]
    if others:
        logger.warning(
            "%s holds no generation, so nothing is restored; it holds files of another "
            "program (%s), which mpi_ckpt does not read: is it the right directory?",
            root,
            ", ".join(others[:3]),
        )


def describe_others(catalog: Catalog, besides: int | None = None) -> str:
    """Return in words the other generations, and that nothing was changed. Not collective.

    Args:
        catalog: Catalog of the directory.
        besides: Number of a generation to leave out.

    Raises:
        ReadError: On the calling rank, if the directory cannot be listed.
    """
    there = [summary for summary in catalog.summaries() if summary.generation != besides]
    listed = ", ".join(map(_describe, there[-_LISTED:])) or "none"
    more = f" and {len(there) - _LISTED} older" if len(there) > _LISTED else ""
    what = "there are" if besides is None else "ask for another; there are"
    return f"{what}: {listed}{more}. Nothing on disk was changed"


def _open(path: Path, *, proven: bool) -> GenerationReader:
    with ExitStack() as closing:
        reader = closing.enter_context(GenerationReader(path))
        if proven:
            verify(reader)
        closing.pop_all()
    return reader


def _number(catalog: Catalog, choice: Choice) -> int:
    if choice.generation is not None and choice.generation in catalog.look().generations:
        return int(choice.generation)
    number = choice.pick(catalog.summaries())
    if number is None:
        raise NoCheckpointError(
            f"{catalog.root} has no {_lacking(choice)}{_aside(catalog, choice)}; "
            f"{describe_others(catalog)}",
            path=catalog.root,
            generation=choice.generation,
        )
    return number


def _hint(root: Path, found: Survey) -> str:
    if not found.rolled_back:
        return ""
    return f"; mpi-ckpt rollback {root} --undo brings back what a rollback has set aside"


def _lacking(choice: Choice) -> str:
    if choice.best is not None:
        return f"generation saved with a metric {choice.best!r} (mode {choice.mode!r})"
    if choice.step is not None:
        return f"generation of step {choice.step}"
    return f"generation {choice.generation}"


def _aside(catalog: Catalog, choice: Choice) -> str:
    if choice.generation is None:
        return ""
    name, found = generation_name(choice.generation), catalog.look()
    if name in found.quarantined:
        return f"; it was set aside: {catalog.root / QUARANTINE / name}"
    is_behind = choice.generation in found.rolled_back_numbers
    return _hint(catalog.root, found) if is_behind else ""


def _describe(summary: GenerationSummary) -> str:
    metrics = "".join(f", {name}={value:.6g}" for name, value in summary.metrics.items())
    return f"{summary.generation} (step {summary.step}{metrics})"


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
