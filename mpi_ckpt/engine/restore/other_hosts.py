# SPDX-License-Identifier: Apache-2.0
"""Checks before a fresh start whether another host has generations under this name.

If the directory is on a disk of one host, and root starts on another host, the job would
find nothing, start afresh, and write a second history under the same name.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from mpi_ckpt.comm import collect
from mpi_ckpt.errors import ReadError, RestoreError
from mpi_ckpt.storage.directory.recovery import Survey, survey
from mpi_ckpt.storage.owning.lock import signed_job
from mpi_ckpt.storage.owning.mounts import local_file_system

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.engine.session import Session

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
