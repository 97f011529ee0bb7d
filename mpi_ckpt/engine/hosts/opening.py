# SPDX-License-Identifier: Apache-2.0
"""Opens the directory of each host, and finds out whether the hosts are apart."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.comm import agree, any_of, collect
from mpi_ckpt.errors import CheckpointError, OptionsError, ReadError, RestoreError
from mpi_ckpt.storage.local.host_directory import HostDirectory, newest_below

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.hosts.local_settings import Local
    from mpi_ckpt.engine.session import Session

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
