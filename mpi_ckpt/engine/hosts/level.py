# SPDX-License-Identifier: Apache-2.0
"""Opens the local level of a job: a directory on each host, used by the host's leader."""

from __future__ import annotations

import json
import logging
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import agree, any_of, collect, on_root
from mpi_ckpt.engine.hosts.copying.drain import Drain
from mpi_ckpt.engine.hosts.placement import count_copies
from mpi_ckpt.errors import (
    CheckpointError,
    OptionsError,
    ReadError,
    RestoreError,
    SaveError,
)
from mpi_ckpt.memory import Arena
from mpi_ckpt.storage.local.host_directory import HostDirectory, newest_below
from mpi_ckpt.storage.local.lineage import (
    Lineage,
    LocalRun,
    Origin,
    read_lineage,
    write_lineage,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.hosts.host_tiles import HostSurvey
    from mpi_ckpt.engine.hosts.local_settings import Local
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.memory import Memory
    from mpi_ckpt.options import Options

logger = logging.getLogger(__name__)


_OPENING = "opening the directories of the hosts"
_NAMED = 8


@dataclass(frozen=True, slots=True)
class OpenedHomes:
    """The directories of all hosts.

    Attributes:
        home: That of this host, on its leader; None elsewhere, or if it cannot be used.
        number: The highest number of a generation on any host; the same on every rank.
        is_durable: Whether none of them lies in memory; the same on every rank.
        unusable: Host -> why its directory cannot be used; the same on every rank.
    """

    home: HostDirectory | None
    number: int
    is_durable: bool
    unusable: Mapping[str, str]


def open_homes(session: Session, local: Local, folder: str, token: str) -> OpenedHomes:
    """Make and lock the directory of each host.

    Collective. Main thread only.

    Args:
        session: The manager's.
        local: The settings of the level.
        folder: Name of the folder below its path.
        token: Name of this start, the same on every rank.

    Raises:
        OptionsError: On every rank, if two hosts see one directory.
    """
    comm, problems = session.comm, list[str]()

    def show() -> HostDirectory | None:
        if comm.rank not in comm.topology.leaders:
            return None
        path = local.place(comm.hosts[comm.rank]) / folder
        home = HostDirectory(path, session.options.io.mode)
        try:
            home.show(token, comm.rank)
        except CheckpointError as error:
            problems.append(str(error))
        return home

    home = agree(comm, _OPENING, show, error=RestoreError)
    # Before any is locked: of two hosts that see one directory, one would wait in vain.
    sees_other = home is not None and bool(home.others(token, comm.rank))
    (is_shared,) = any_of(comm, _OPENING, sees_other)

    def own() -> bytes:
        if home is None:
            return b""
        try:
            if not problems and not is_shared:
                home.own()
        except CheckpointError as error:
            problems.append(str(error))
        answer = sees_other, "".join(problems), home.highest, home.is_in_memory
        return json.dumps(answer).encode()

    def judge(parts: Sequence[bytes]) -> list[Any]:
        answers = _by_host(comm, parts)
        shared = [host for host, (is_seen, *_) in answers.items() if is_seen]
        if is_shared:
            raise OptionsError(
                f"{list_hosts(shared)} see one directory under {local.path}, and a local "
                "level needs one on each host's own disk; {host} in the path stands for "
                "the name of the host"
            )
        unusable = {host: text for host, (_, text, *_) in answers.items() if text}
        for host, text in list(unusable.items())[:_NAMED]:
            logger.warning("%s cannot keep generations: %s", host, text)
        number = max(number for _, _, number, _ in answers.values())
        return [unusable, number, not any(memory for *_, memory in answers.values())]

    unusable, number, is_durable = collect(comm, _OPENING, own, judge, error=RestoreError)
    return OpenedHomes(None if problems else home, number, is_durable, unusable)


def refuse_moved(session: Session, local: Local) -> None:
    """Refuse a fresh start if hosts keep generations of a directory of this name.

    Collective. Main thread only. The directory then lies on a disk of one host, and root
    on another one.

    Raises:
        ReadError: On every rank, with these hosts.
    """
    comm, root = session.comm, session.directory.root

    def look() -> bytes:
        if comm.rank not in comm.topology.leaders:
            return b""
        found = [
            [manifest.step, manifest.local.hosts[0]]
            for manifest in newest_below(local.place(comm.hosts[comm.rank]))
            if manifest.local is not None and manifest.local.directory == str(root)
        ]
        return json.dumps(max(found)).encode() if found else b""

    def judge(parts: Sequence[bytes]) -> None:
        held = _by_host(comm, parts)
        if held and not session.directory.catalog.look().generations:
            step, home = max(held.values())
            raise ReadError(
                f"root, on {comm.hosts[comm.root]}, finds nothing in {root}, but "
                f"{list_hosts(held)} keep local generations of a directory of that name, "
                f"up to step {step}, saved by a job with root on {home}. If the directory "
                "is on a disk of that host alone, start the job with root there, or move "
                f"it to a place that all hosts see; to start anew, remove {local.path} on "
                "these hosts. Nothing was changed",
                path=root,
            )

    collect(comm, "looking for generations on hosts", look, judge, error=RestoreError)


def list_hosts(hosts: Collection[str]) -> str:
    """Return names of hosts in words, a few at most. Not collective. Thread-safe."""
    more = len(hosts) - _NAMED
    named = ", ".join(list(hosts)[:_NAMED])
    return f"{named} and {more:,} more" if more > 0 else named


def _by_host(comm: Communicator, parts: Sequence[bytes]) -> dict[str, Any]:
    """Return what the leaders have sent as JSON, by the names of their hosts."""
    return {comm.hosts[rank]: json.loads(part) for rank, part in enumerate(parts) if part}


_FAILURES_MAX = 3


@dataclass(frozen=True, slots=True)
class HostNames:
    """The hosts of a job, in the order of their leaders.

    Attributes:
        names: Their names; root's is the first.
        domains: Their failure domains.
        leaders: The ranks of their leaders.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    leaders: tuple[int, ...]

    @classmethod
    def of(cls, comm: Communicator, local: Local) -> HostNames:
        """Return the hosts of a communicator. Not collective: the same on every rank."""
        leaders = comm.topology.leaders
        names = tuple(comm.hosts[rank] for rank in leaders)
        return cls(names, local.domains(names), leaders)


class HostLevel:
    """The local level of one manager.

    Main thread only. A host is unusable if its directory cannot be opened: then a restore
    does without it, and a save fails.

    Args:
        local: Its settings.
        memory: The manager's `Memory`, whose copy comes from the same point; None for none.

    Attributes:
        local: Its settings.
        folder: Name of the folder with the generations on each host; empty before `open`.
        home: The directory of this host, on its leader once it is open; None elsewhere.
        origin: The point in the history that the states come from; None for a fresh start,
            or if it is not known.
        run: Name of this run in the lineage; empty before its first save.
        number: The highest number of a local generation; the same on every rank.
        kept: Numbers of the generations that this run has kept, or come from.
        failures: How many saves in a row have failed.
        is_durable: Whether no host keeps its generations in memory.
        reported: The losses last reported.
        drain: Copies generations to the directory; None if the ranks write there.
        survey: How cut leaves lay on the ranks at the last save; None for none.
        is_likely_unequal: Whether the last save has made replicas equal.
        tile_memory: Memory for the files of tiles of an asynchronous save, on leaders.
    """

    def __init__(self, local: Local, memory: Memory | None = None) -> None:
        self.local = local
        self._memory = memory
        self.folder = ""
        self.home: HostDirectory | None = None
        self.origin: Origin | None = None
        self.run = ""
        self.number = 0
        self.kept: list[int] = []
        self.failures = 0
        self.is_durable = False
        self.reported = ""
        self.drain = None if local.drain is None else Drain(local.drain)
        self.survey: HostSurvey | None = None
        self.is_likely_unequal = False
        self.tile_memory = Arena()
        self._unusable: Mapping[str, str] = {}
        self._source: Origin | None = None

    @classmethod
    def over(cls, local: Local, options: Options, memory: Memory | None) -> HostLevel:
        """Make the level of a manager. Not collective: called on every rank.

        Args:
            local: Its settings.
            options: The manager's.
            memory: The manager's `Memory`; None for none.

        Raises:
            OptionsError: On every rank, if the options contradict it.
        """
        if options.read_only or not options.sync:
            raise OptionsError(
                "a manager with local=Local(...) saves, and makes the replicas equal "
                "first: not with Options(read_only=True), nor with Options(sync=False)"
            )
        return cls(local, memory)

    @property
    def is_open(self) -> bool:
        """Whether the hosts' directories are open. Not collective: the same everywhere."""
        return bool(self.folder)

    @property
    def is_off(self) -> bool:
        """Whether saves were switched off. Not collective: the same on every rank."""
        return self.failures >= _FAILURES_MAX

    def open(self, session: Session, *, makes: bool) -> bool:
        """Open the directories of the hosts, once.

        Collective.

        Args:
            session: The manager's.
            makes: Whether to make them if there is no lineage yet.

        Returns:
            Whether they are open.

        Raises:
            OptionsError: On every rank, if two hosts see one directory.
            RestoreError: On every rank, if the lineage cannot be read.
        """
        if self.is_open:
            return True
        comm, root = session.comm, session.directory.root

        def look() -> list[str] | None:
            found = read_lineage(root)
            if found is None and not makes:
                return None
            folder = f"{root.name}-{secrets.token_hex(6)}" if found is None else found.home
            return [folder.lstrip("."), secrets.token_hex(6)]

        found = on_root(comm, "reading the lineage", look, error=RestoreError)
        if found is None:
            refuse_moved(session, self.local)
            return False
        self.folder, token = found
        try:
            opened = open_homes(session, self.local, self.folder, token)
        except CheckpointError:
            self.folder = ""
            raise
        self.home, self.number = opened.home, opened.number
        self.is_durable, self._unusable = opened.is_durable, opened.unusable
        return True

    def require_usable(self) -> None:
        """Refuse to save if a host's directory cannot be used. Not collective.

        Raises:
            SaveError: On every rank that calls, with these hosts.
        """
        if self._unusable:
            raise SaveError(
                f"{list_hosts(self._unusable)} cannot keep generations in "
                f"{self.local.path}: {next(iter(self._unusable.values()))}"
            )

    def close(self) -> None:
        """Release the directory of this host. Not collective. Callable twice."""
        home, self.home, self.folder = self.home, None, ""
        self.tile_memory.close()
        if home is not None:
            home.close()

    def survived_losses(self, hosts: HostNames) -> frozenset[str]:
        """Return what its generations survive; see `SaveReport`. Not collective."""
        losses = {"process"}
        if count_copies(self.local.wanted_copies, hosts.domains) > 1:
            losses.add("host")
        return frozenset([*losses, *(["power"] if self.is_durable else [])])

    def note_origin(self, origin: Origin | None) -> None:
        """Note where the states come from. Not collective: called on every rank.

        A run that goes back to an older point goes on as another run.
        """
        self._go_to(origin)
        self._source = origin
        self.run = ""
        self.kept = [origin.number] if origin is not None and origin.number else []

    def note_restored(self, generation: int, kept: Origin | None) -> None:
        """Note what was restored. Not collective: called on every rank.

        Args:
            generation: Number of the generation; 0 for a copy in memory.
            kept: The generation, if it is a local one.
        """
        origin = kept or Origin("", generation, 0)
        if generation == 0:
            known = None if self._memory is None else self._memory.origin
            self.note_origin(None if known is None else Origin(*known))
        else:
            self.note_origin(origin)

    def note_kept(self, origin: Origin) -> None:
        """Note a local generation that all hosts have kept. Not collective."""
        self._go_to(origin)
        self.failures = 0
        self.kept = [*self.kept, origin.number][-self.local.keep :]

    @property
    def needed(self) -> tuple[int, ...]:
        """The local generations that must stay on the hosts. Not collective."""
        return (*self.kept, *(self.drain.needed if self.drain else ()))

    def note_published(self, generation: int) -> None:
        """Note a generation in the directory. Not collective: called on every rank."""
        self._go_to(Origin("", generation, 0))

    def begin_run(self, session: Session) -> None:
        """Enter this run into the lineage, before its first generation. Root only.

        Args:
            session: The manager's; its directory is owned.

        Raises:
            CheckpointError: On the calling rank, if the lineage cannot be replaced.
        """
        if self.run:
            return
        directory, comm = session.directory, session.comm
        lineage = read_lineage(directory.root) or Lineage(self.folder)
        hosts = HostNames.of(comm, self.local).names
        run = LocalRun(
            secrets.token_hex(6),
            directory.job,
            _named(self._source, session, lineage),
            behind=directory.catalog.look().last_rollback,
            path=self.local.path,
            hosts=hosts,
        )
        write_lineage(
            directory.root,
            lineage.with_run(run),
            directory.job,
        )
        self.run = run.run
        logger.info("local saves go to %d hosts, %s", len(hosts), self.local.path)

    def settle(self, session: Session) -> None:
        """Remove the local generations of a training that has ended well.

        Collective. They are removed if the directory has a newer one, which a later start
        then takes.

        Args:
            session: The manager's; no save is pending.
        """
        origin = self.origin
        is_newer = origin is not None and origin.number == 0 and origin.base > 0
        if not (self.is_open and self.run and is_newer):
            return

        def note() -> bool:
            assert origin is not None
            directory = session.directory
            lineage = read_lineage(directory.root)
            if lineage is None or lineage.runs[-1].run != self.run:
                return False
            last = replace(lineage.runs[-1], settled=origin.base)
            write_lineage(
                directory.root,
                lineage.with_run(last),
                directory.job,
            )
            return True

        try:
            noted = on_root(session.comm, "ending a local level", note, error=RestoreError)
        except CheckpointError as error:
            if session.comm.is_broken:
                raise
            if session.comm.is_root:
                logger.warning("local generations are not removed: %s", error)
            return
        if noted and self.home is not None:
            self.home.keep_only(())

    def _go_to(self, origin: Origin | None) -> None:
        self.origin = origin
        if self._memory is not None:
            self._memory.origin = origin


def _named(origin: Origin | None, session: Session, lineage: Lineage) -> Origin | None:
    """Return a point whose run is known: of a directory's generation, its job.

    Of one that was copied from hosts it is the point of its source: what its run kept while
    it was copied is not on the way.
    """
    if origin is None or origin.run:
        return origin
    for info in session.directory.catalog.generations():
        if info.generation == origin.base and info.job:
            source = lineage.source(info.generation, info.time)
            return source or origin._replace(run=info.job)
    return None
