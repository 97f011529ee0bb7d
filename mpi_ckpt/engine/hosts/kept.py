# SPDX-License-Identifier: Apache-2.0
"""Finds and opens the newest generation that the hosts can complete."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import agree, any_of, bcast_buffers, collect
from mpi_ckpt.engine.hosts.completable import HeldGeneration, Holding, choose, what_is_lost
from mpi_ckpt.engine.hosts.root_copies import send_headers_to_root, send_to_root
from mpi_ckpt.errors import CorruptGenerationError, ReadError, RestoreError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.states.unshared.ranked import RankedState
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.format.manifest_codec import decode
from mpi_ckpt.storage.local.host_directory import HostReader
from mpi_ckpt.storage.local.lineage import Origin, read_lineage

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from contextlib import ExitStack

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.hosts.level import HostLevel
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.format.manifest import Manifest
    from mpi_ckpt.storage.reading.read_plan import Window
    from mpi_ckpt.storage.reading.reader import GenerationReader

logger = logging.getLogger(__name__)

_LOOKING = "looking for generations on hosts"
_READING = "reading a local generation"


@dataclass(frozen=True, slots=True)
class KeptGeneration:
    """A local generation that is complete on the hosts at hand.

    Attributes:
        origin: The generation.
        manifest: Its manifest, on every rank.
        holders: File name -> ranks of the leaders that hold it.
        path: Where root's host has it, or would have it.
        reader: Its open files on this host, on a leader; None elsewhere.
        is_copied: Whether the newest generation of the directory is a copy of it.
    """

    origin: Origin
    manifest: Manifest
    holders: Mapping[str, Sequence[int]]
    path: Path
    reader: GenerationReader | None
    is_copied: bool = False

    @property
    def readers(self) -> tuple[int, ...]:
        """The ranks that may read some of it."""
        return tuple(sorted({rank for ranks in self.holders.values() for rank in ranks}))

    def sources(self, windows: Sequence[Window]) -> list[int]:
        """Return the rank that reads each window, so that all read about as much.

        Not collective: the same on every rank.
        """
        loads = dict.fromkeys(self.readers, 0)
        sources = []
        for window in windows:
            source = min(self.holders[window.file], key=lambda rank: (loads[rank], rank))
            loads[source] += window.end - window.start
            sources.append(source)
        return sources


def find_kept(
    session: Session,
    states: Sequence[State],
    stack: ExitStack,
    *,
    skips: bool,
    is_partial: bool,
) -> KeptGeneration | None:
    """Find the newest local generation that counts, unless the directory has a newer one.

    Collective. Main thread only.

    Args:
        session: The manager's.
        states: The states of the program.
        stack: Closes the opened files.
        skips: Whether root restores from a copy in memory, which comes first.
        is_partial: Whether only some states will be restored.

    Raises:
        RestoreError: On every rank, if root cannot read the directory; if newer work is
            lost and `Local.lost` is ``"raise"``; for some states of a local generation.
    """
    level = session.hosts
    if level is None or not level.open(session, makes=False):
        return None
    while True:
        chosen, lost = _judge(session, level, skips=skips)
        if lost:
            _report_lost(session, level, lost)
        if chosen is None:
            return None
        if is_partial:
            raise RestoreError(
                f"hosts keep a generation of step {chosen.step}, newer than any in "
                f"{session.directory.root}, and restore(only=...) reads the directory "
                "alone: restore all states at once. Nothing was changed"
            )
        bad: RestoreError
        try:
            return _open(session, level, chosen, states, stack)
        # The ranks agreed on it: every rank is here, with the same error.
        except (CorruptGenerationError, ReadError) as problem:
            bad = problem
        if not set_aside_bad(session, chosen.origin.number, bad):
            raise bad


def set_aside_bad(session: Session, number: int, error: RestoreError) -> bool:
    """Quarantine the copies that a restore has found bad, each on its host.

    Collective. Main thread only.

    Args:
        session: The manager's.
        number: The local generation.
        error: What all ranks have agreed on; on a rank that has failed, its cause is the
            failure there.

    Returns:
        Whether any copy was set aside: then another search finds other copies.
    """
    cause, home = error.__cause__, None if session.hosts is None else session.hosts.home
    done = False
    if home is not None and isinstance(cause, (CorruptGenerationError, ReadError)):
        path = Path(cause.path or "")
        if path.parent == home.path / generation_name(number):
            done = home.set_aside(number, path.name, cause)
    return any_of(session.comm, "setting copies aside", done)[0]


def _judge(
    session: Session, level: HostLevel, *, skips: bool
) -> tuple[HeldGeneration | None, str]:
    """Let root choose; return the choice, and what is lost, on every rank."""
    comm, directory, home = session.comm, session.directory, level.home

    def look() -> bytes:
        holdings = []
        if home is not None:
            for reader, data in home.generations():
                found = _holding(comm.rank, reader.manifest, reader.absent, data)
                holdings.append(found.to_json())
        return json.dumps(holdings).encode()

    def judge(parts: Sequence[bytes]) -> list[Any]:
        holdings = [
            Holding.from_json(one)
            for rank in comm.topology.leaders
            for one in json.loads(parts[rank])
        ]
        if skips:
            return [None, ""]
        lineage = read_lineage(directory.root)
        newest, moment = _newest_in_directory(session)
        copied = None if lineage is None else lineage.source(newest, moment)
        rolled_back = directory.catalog.look().last_rollback
        verdict = choose(
            holdings, lineage, newest=newest, copied=copied, rolled_back=rolled_back
        )
        runs = {one.origin.run for one in holdings}
        lost = what_is_lost(verdict, lineage, runs, newest=newest, here=comm.topology.names)
        chosen = verdict.chosen
        if chosen is None:
            return [None, lost]
        what = chosen.step, chosen.holders, chosen.manifests, chosen.manifest_bytes
        return [[chosen.origin, *what, chosen.is_copied], lost]

    values, lost = collect(comm, _LOOKING, look, judge, error=RestoreError)
    if values is None:
        return None, lost
    origin, step, holders, manifests, *rest = values
    files = tuple(map(tuple, holders))
    return HeldGeneration(Origin(*origin), step, files, tuple(manifests), *rest), lost


def _holding(
    rank: int, manifest: Manifest, absent: Collection[str], data: bytes
) -> Holding:
    assert manifest.local is not None
    names = [file.name for file in manifest.files]
    return Holding(
        rank,
        Origin(manifest.local.run, manifest.local.base, manifest.generation),
        digest_bytes(data).hex(),
        manifest.step,
        len(names),
        tuple([n for n, name in enumerate(names) if name not in absent]),
        len(data),
    )


def _newest_in_directory(session: Session) -> tuple[int, float]:
    """Return number and time of the newest good generation there; zeros for none."""
    # If all are bad, the hosts may still have a good one; if not, the search reports it.
    with suppress(CorruptGenerationError):
        reader = session.directory.open_newest()
        if reader is not None:
            with reader:
                return reader.manifest.generation, reader.manifest.time
    return 0, 0.0


def _report_lost(session: Session, level: HostLevel, text: str) -> None:
    if level.local.lost == "raise":
        raise RestoreError(
            f"{text}. Nothing was changed: start the job on these hosts, or give "
            'Local(lost="warn") to go on without those steps'
        )
    if session.comm.is_root and text != level.reported:
        logger.warning("%s", text)
    level.reported = text  # a search that finds a bad copy starts again


def _fetch_manifest(
    comm: Communicator, level: HostLevel, chosen: HeldGeneration
) -> Manifest:
    """Send the manifest from a leader that has it to all ranks."""
    source = chosen.manifests[0]

    def read() -> memoryview:
        if comm.rank != source:
            return memoryview(bytearray(chosen.manifest_bytes))
        assert level.home is not None
        return memoryview(level.home.manifest_of(chosen.origin.number))

    data = agree(comm, _READING, read, error=RestoreError)
    bcast_buffers(comm, [data], _READING, source)
    return agree(comm, _READING, lambda: decode(bytes(data)), error=RestoreError)


def _open(
    session: Session,
    level: HostLevel,
    chosen: HeldGeneration,
    states: Sequence[State],
    stack: ExitStack,
) -> KeptGeneration:
    """Open the files of each host; send root what it deals out, and the lists of tiles."""
    manifest = _fetch_manifest(session.comm, level, chosen)
    comm, home, number = session.comm, level.home, manifest.generation
    names = [file.name for file in manifest.files]
    holders = dict(zip(names, chosen.holders, strict=True))
    place = level.local.place(comm.hosts[comm.root]) / level.folder
    dealt = _files_dealt(manifest, states, comm.size)
    sent = send_to_root(session, manifest, holders, dealt)
    headers = send_headers_to_root(session, manifest, holders)

    def open_here() -> GenerationReader | None:
        if comm.is_root:
            where = place if home is None else home.path
            path = where / generation_name(number)
            return stack.enter_context(HostReader(path, manifest, sent, headers))
        if home is not None and comm.rank in chosen.manifests:
            return stack.enter_context(home.open(number))
        return None

    reader = agree(comm, _READING, open_here, error=RestoreError)
    path = place / generation_name(number)
    return KeptGeneration(chosen.origin, manifest, holders, path, reader, chosen.is_copied)


def _files_dealt(manifest: Manifest, states: Sequence[State], size: int) -> list[str]:
    """Return the names of the files of which root reads the parts of all ranks."""
    needed: set[str] = set()
    for state in states:
        stored = manifest.state(state.name)
        if not isinstance(state, RankedState) or stored is None:
            continue
        needed.update(leaf.extent.file for leaf in stored.leaves)
        # Parts among the tiles go to their ranks, unless root makes new ones of them all.
        if state.resizes and manifest.size != size:
            needed.update(stored.files)
    return sorted(needed)
