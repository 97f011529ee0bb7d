# SPDX-License-Identifier: Apache-2.0
"""Finds the source of a restore: a copy in memory, or the newest good generation."""

from __future__ import annotations

import json
import logging
import os
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.comm import agree, any_of, choose_ranks, collect, on_root
from mpi_ckpt.engine.hosts.kept import find_kept, set_aside_bad
from mpi_ckpt.engine.outline import Outline
from mpi_ckpt.errors import CorruptGenerationError, ReadError, RestoreError
from mpi_ckpt.reports import GenerationInfo
from mpi_ckpt.states.unshared.ranked import RankedState
from mpi_ckpt.storage.directory.finding import describe_others, warn_of_other_programs
from mpi_ckpt.storage.directory.recovery import Survey, survey
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.owning.lock import signed_job
from mpi_ckpt.storage.owning.ownership import local_file_system
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from mpi_ckpt.choice import Choice
    from mpi_ckpt.engine.hosts.kept import KeptGeneration
    from mpi_ckpt.engine.registry import Registry
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.memory import MemoryCopy
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.directory import CheckpointDirectory
    from mpi_ckpt.storage.reading.read_plan import Window

logger = logging.getLogger(__name__)


_DOING = "looking for generations on other hosts"
_BATCH = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "COBALT_JOBID")
"""Set within jobs that a scheduler may start on another host next time."""


def look_elsewhere(session: Session) -> None:
    """Before a fresh start, ask the other hosts what is in their directory of that name.

    Collective. Main thread only. Root warns if a later job could miss what this job saves.

    Raises:
        ReadError: On every rank, if another host has generations and root's host has none.
    """
    comm, directory = session.comm, session.directory
    if len(comm.topology.names) < 2:
        _warn_of_one_host(session)
        return

    def look() -> bytes:
        if comm.is_root or comm.rank not in comm.topology.leaders:
            return b""
        found = Survey()
        with suppress(ReadError):
            found = survey(directory.root)
        newest = max(found.generations, default=0)
        owner = signed_job(directory.root)
        return json.dumps([len(found.generations), newest, owner]).encode()

    def judge(parts: Sequence[bytes]) -> None:
        seen = {
            comm.hosts[rank]: json.loads(part) for rank, part in enumerate(parts) if part
        }
        held = [
            f"{count} on {host}, the newest {newest}"
            for host, (count, newest, _) in seen.items()
            if count
        ]
        mine = comm.hosts[comm.root]
        if held:
            raise ReadError(
                f"root, on {mine}, finds no generation in {directory.root}, but other "
                f"hosts have some under that name: {'; '.join(held)}. If each host has a "
                "directory of its own, start the job with root on such a host, or copy "
                "the generations to a directory that all hosts see; if all hosts see this "
                "directory, root sees an old state of it: start the job again. Nothing "
                "was changed",
                path=directory.root,
            )
        unseen = [host for host, (_, _, owner) in seen.items() if owner != directory.owner]
        if directory.owner and unseen:
            _warn(session, f"{len(unseen)} other hosts do not see it, {unseen[0]} first")

    collect(comm, _DOING, look, judge, error=RestoreError)


def _warn_of_one_host(session: Session) -> None:
    if not session.comm.is_root or not any(os.environ.get(name) for name in _BATCH):
        return
    kind = local_file_system(session.directory.root)
    if kind:
        _warn(session, f"it is on {kind}, which no other host sees")


def _warn(session: Session, why: str) -> None:
    comm, root = session.comm, session.directory.root
    logger.warning(
        "nothing was saved yet in %s, and it seems to be a directory of %s alone: %s. A "
        "later job whose root is on another host would not find what this one saves "
        "(docs/hosts.md)",
        root,
        comm.hosts[comm.root],
        why,
    )


@dataclass(frozen=True, slots=True)
class OpenGeneration:
    """The open source of a restore.

    Attributes:
        outline: Its outline, on every rank.
        states: The requested states of the program.
        readers: The ranks that read it, root first; empty for a copy in memory.
        reader: Its open files, on root and, once opened, on the other ranks that read; None
            elsewhere.
        copy: The copy of this rank, if it is of the same form as root's; else None.
        kept: The generation on the hosts, if it is a local one; else None.
        text: Of a copy in memory, the text of its whole outline.
    """

    outline: Outline
    states: tuple[State, ...]
    readers: tuple[int, ...] = ()
    reader: GenerationReader | None = None
    copy: MemoryCopy | None = None
    kept: KeptGeneration | None = None
    text: bytes = b""

    @property
    def is_copy(self) -> bool:
        """Whether it is a copy in memory."""
        return self.outline.generation == 0

    @property
    def level(self) -> Literal["memory", "local", "directory"]:
        """Where it is."""
        if self.is_copy:
            return "memory"
        return "directory" if self.kept is None else "local"

    def sources(self, windows: Sequence[Window]) -> Sequence[int]:
        """Return the rank that reads each window. Not collective: the same everywhere."""
        if self.kept is not None:
            return self.kept.sources(windows)
        return [self.readers[turn % len(self.readers)] for turn in range(len(windows))]


@contextmanager
def open_newest(
    session: Session,
    registry: Registry,
    only: Collection[str] | None,
    *,
    pinned: int | None,
    choice: Choice,
    from_memory: bool,
) -> Iterator[OpenGeneration | None]:
    """Find the source of a restore; root keeps it open within the block.

    Collective. Main thread only.

    Args:
        session: The manager's.
        registry: The manager's.
        only: Names of the states to restore; None for all. If some are named, all bytes are
            proven here, because later restores will take other states from the same
            generation.
        pinned: Number of the generation that must be used; None for the newest.
        choice: The program's request, not checked yet; it overrides ``pinned``.
        from_memory: Whether a copy in root's memory comes before any file.

    Raises:
        RegistrationError: On every rank, if names are unknown or differ between ranks.
        OptionsError: On every rank, if the request is invalid.
        RestoreError: On every rank, if root finds generations but no good one, or not the
            requested one.
    """
    comm, memory = session.comm, session.memory
    comm.call = "restore()"
    copy = memory.copy if memory is not None and from_memory else None
    with ExitStack() as stack:
        opened: list[GenerationReader] = []
        outlined: list[Outline] = []
        kept, is_partial = None, only is not None
        if choice.is_newest and pinned is None:
            skips = comm.is_root and copy is not None
            how = {"skips": skips, "is_partial": is_partial}
            kept = find_kept(session, registry.states, stack, **how)

        def look(states: list[State]) -> list[State]:
            wanted = choice.checked(session.options.retention)
            session.directory.goes_on = True
            if comm.is_root and copy is None and kept is None:
                found = _open(session.directory, pinned, wanted, proven=is_partial)
                if found is not None:
                    opened.append(stack.enter_context(found))
            return states

        def encode(states: list[State]) -> bytes:
            if copy is not None:
                return copy.text
            found = kept or (opened[0] if opened else None)
            if found is None:
                return b""
            outlined.append(_outline(session, found, states))
            return json.dumps(outlined[0].to_json()).encode()

        met = registry.begin(
            f"looking for {'a generation' if choice.is_newest else choice}",
            only,
            look,
            error=RestoreError,
            skipped=True,
            encode=encode,
        )
        if not met.message:
            look_elsewhere(session)
            yield None
            return
        # Only the rank that has made it can do without reading it.
        outline = outlined[0] if outlined else Outline.from_json(json.loads(met.message))
        outline = outline.only([state.name for state in met.result])
        found = OpenGeneration(outline, tuple(met.result), text=met.message)
        yield _opened(session, found, copy, kept, opened)


def _opened(
    session: Session,
    found: OpenGeneration,
    copy: MemoryCopy | None,
    kept: KeptGeneration | None,
    opened: Sequence[GenerationReader],
) -> OpenGeneration:
    """Return a source with what this rank has of it."""
    if found.is_copy:
        is_alike = copy is not None and copy.text == found.text
        return replace(found, copy=copy if is_alike else None)
    if kept is None:
        readers = choose_ranks(session.options.io.readers, session.comm.topology)
        reader = opened[0] if opened else None
    else:
        readers, reader = kept.readers, kept.reader
    return replace(found, readers=readers, reader=reader, kept=kept, text=b"")


def _outline(
    session: Session, found: KeptGeneration | GenerationReader, states: Sequence[State]
) -> Outline:
    """Return the outline of a generation. On root."""
    deals = {state.name: isinstance(state, RankedState) for state in states}
    aside = session.directory.set_aside
    return Outline.of_generation(found.manifest, str(found.path), deals, dict(aside))


def open_on_readers(
    session: Session, found: OpenGeneration, stack: ExitStack
) -> OpenGeneration:
    """Open a generation on the other ranks that read it; root has already opened it.

    Collective. Main thread only.

    Args:
        session: The manager's.
        found: Result of `open_newest`.
        stack: Closes the opened files.

    Raises:
        ReadError: On every rank, if a reading rank cannot open it.
    """
    comm = session.comm
    if len(found.readers) < 2 or found.kept is not None:
        return found
    path = session.directory.root / generation_name(found.outline.generation)

    def open_here() -> OpenGeneration:
        if comm.is_root or comm.rank not in found.readers:
            return found
        try:
            reader = stack.enter_context(GenerationReader(path))
        except CorruptGenerationError as error:
            # Root has found it good: the fault is in this host's view of it.
            raise ReadError(
                f"{error}. Root can read it; several readers need a directory that all "
                "hosts see, IO(readers='root') does not",
                path=path,
            ) from error
        return replace(found, reader=reader)

    return agree(comm, "opening a generation", open_here, error=RestoreError)


def reject(
    session: Session, found: OpenGeneration, problem: CorruptGenerationError
) -> None:
    """Quarantine a generation that turned out bad while it was read.

    Collective. Main thread only. Of a local one, only the bad copies of its files.

    Raises:
        RestoreError: On every rank, if root fails to, or no bad copy can be told.
    """
    if found.kept is not None:
        if not set_aside_bad(session, found.outline.generation, problem):
            raise problem
        return
    # The finding alone: the reason must not describe the states, since another generation
    # will be restored.
    reason = CorruptGenerationError(
        "; ".join(dict.fromkeys(failure.message for failure in problem.failures))
        or str(problem),
        path=problem.path,
        generation=problem.generation,
    )
    on_root(
        session.comm,
        "setting a generation aside",
        lambda: session.directory.reject(found.outline.generation, reason),
        error=RestoreError,
    )


def is_lost(session: Session, found: OpenGeneration, problem: ReadError) -> bool:
    """Return whether a generation was pruned while it was read, by the job that owns it.

    Collective. Main thread only. A job without the lock reads while the owner may prune. A
    local generation is lost with a copy that a host cannot read; other hosts have others.
    """
    if found.kept is not None:
        return set_aside_bad(session, found.outline.generation, problem)
    number = found.outline.generation
    gone = session.comm.is_root and session.directory.has_lost(number)
    return any_of(session.comm, "looking whether a generation is still there", gone)[0]


def list_generations(session: Session) -> list[GenerationInfo]:
    """Return on all ranks the generations that root finds, oldest first.

    Collective. No save is pending.

    Raises:
        CheckpointError: On every rank, if root cannot list the directory.
    """
    catalog = session.directory.catalog
    session.comm.call = "generations()"
    records = on_root(
        session.comm,
        "listing generations",
        lambda: [info.to_json() for info in catalog.generations()],
        error=RestoreError,
    )
    return [
        GenerationInfo(**{**record, "path": Path(record["path"])}) for record in records
    ]


def _open(
    directory: CheckpointDirectory, pinned: int | None, choice: Choice, *, proven: bool
) -> GenerationReader | None:
    if not choice.is_newest:
        return directory.open(choice, proven=proven)
    if pinned is not None:
        path = directory.root / generation_name(pinned)
        return GenerationReader(path, tiles_later=True)
    reader = _open_newest(directory, proven=proven)
    if reader is None:
        warn_of_other_programs(directory.root)
    return reader


def _open_newest(
    directory: CheckpointDirectory, *, proven: bool
) -> GenerationReader | None:
    while True:
        reader = directory.open_newest(tiles_later=True)
        if reader is None or not proven:
            return reader
        number = reader.manifest.generation
        try:
            verify(reader)
        except CorruptGenerationError as problem:
            reader.close()
            directory.reject(number, problem)
        except ReadError:
            reader.close()
            if not directory.has_lost(number):
                raise
        else:
            return reader


def explain_choice(
    session: Session, found: OpenGeneration, problem: CorruptGenerationError
) -> CorruptGenerationError:
    """Return the error for a requested generation that turned out bad.

    Collective. Main thread only. It is not quarantined: the user who asked for it may want
    to recover data from it.
    """
    number = found.outline.generation
    others = on_root(
        session.comm,
        "listing generations",
        lambda: describe_others(session.directory.catalog, number),
        error=RestoreError,
    )
    return CorruptGenerationError(
        f"{problem}. Generation {number} was requested, so no other is used instead; "
        f"{others}",
        path=problem.path,
        generation=number,
        failures=problem.failures,
    )


def go_on_from(session: Session, chosen: Outline | None) -> None:
    """Make the next save build on the restored generation.

    Not collective. Works on root only.

    Args:
        session: The manager's.
        chosen: The requested generation; None if the newest was taken.
    """
    if not session.comm.is_root:
        return
    directory = session.directory
    base = None if chosen is None else chosen.generation
    if directory.base != base:
        directory.base = base
        directory.forget_newest()
    if chosen is not None:
        logger.info(
            "restored generation %d, step %d, as requested%s",
            chosen.generation,
            chosen.step,
            _newer(session, chosen.generation),
        )


def _newer(session: Session, chosen: int) -> str:
    root = session.directory.root
    newer: list[int] = []
    with suppress(ReadError):  # the restore has succeeded
        there = sorted(session.directory.catalog.look().generations)
        newer = [number for number in there if number > chosen]
    if not newer:
        return ""
    return (
        f"; newer generations stay: {', '.join(map(str, newer))}. The next save gets a "
        "higher number and is the newest from then on; until then, a restore without a "
        f"request takes generation {newer[-1]}. To set the newer generations aside, end "
        f"this job, then: mpi-ckpt rollback {root} {chosen}"
    )
