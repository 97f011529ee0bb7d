# SPDX-License-Identifier: Apache-2.0
"""Shows that a job is alive on file systems without locks: it rewrites a small file.

A kernel lock ends with the process that holds it; a lease ends by time (Gray and Cheriton,
"Leases", SOSP 1989). A job that wants the directory watches the file of the job that has
signed the lock: if it changes, that job is alive; if it does not change for a whole term,
that job is dead. Each watcher uses only its own clock, so clocks of different hosts are
never compared.

The lease only shows that a job is alive. The signature decides which job owns the
directory, and a renewal never changes it: a job that sleeps through its term is fenced off
when it wakes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mpi_ckpt.errors import SaveError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.faults import in_words, os_errors_as
from mpi_ckpt.storage.format.layout import lease_name, leased_job

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

RENEW_SECONDS = 5.0
TERM_SECONDS = 30.0
"""After so long without a renewal a job is taken for dead: five of them may fail."""

_POLL_SECONDS = 0.25
_BYTES_MAX = 64


class Lease:
    """The lease of one job, renewed by a thread until it is closed.

    Root only. Not thread-safe.

    Args:
        root: The checkpoint directory; must exist.
        job: Name of the job.

    Raises:
        SaveError: On the calling rank, if the file cannot be made.
    """

    def __init__(self, root: Path, job: str) -> None:
        self._path = root / lease_name(job)
        self._process = os.getpid()
        self._ended = threading.Event()
        with (
            os_errors_as(SaveError, "making the lease", self._path),
            filesystem.create_file(self._path) as descriptor,
        ):
            filesystem.write_all(descriptor, _renewal(0), 0)
            filesystem.sync_file(descriptor)
        self._thread = threading.Thread(
            target=self._renew_on, name="mpi_ckpt lease", daemon=True
        )
        self._thread.start()

    def _renew_on(self) -> None:
        count, warned = 0, False
        while not self._ended.wait(RENEW_SECONDS):
            count += 1
            try:
                filesystem.rewrite_file(self._path, _renewal(count))
            except FileNotFoundError:
                # A successor has removed it; the next save finds that in the signature.
                logger.warning("%s is gone: another job has taken over", self._path)
                return
            except OSError as error:
                if not warned:
                    logger.warning(
                        "the lease %s cannot be renewed: %s. Tried again every %g s; after "
                        "%g s another job may take the directory over from this one",
                        self._path,
                        in_words(error),
                        RENEW_SECONDS,
                        TERM_SECONDS,
                    )
                warned = True

    def close(self) -> None:
        """End the lease; in a forked child, do nothing. Callable twice."""
        if self._process != os.getpid() or self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(RENEW_SECONDS)  # no longer: a file server may be unreachable
        with suppress(OSError):  # the lease then ends by time
            filesystem.remove_file(self._path)


def wait_for_end(root: Path, job: str, patience_seconds: float) -> bool:
    """Wait until the lease of a job has ended, or proves the job alive.

    Not collective.

    Args:
        root: The checkpoint directory.
        job: Name of the job.
        patience_seconds: How long a live job may take to end.

    Returns:
        Whether it has ended: it was removed, did not change for a term, or never existed.

    Raises:
        SaveError: On the calling rank, if it cannot be read.
    """
    path = root / lease_name(job)
    begun = changed = time.monotonic()
    before = _read(path)
    while before is not None:
        time.sleep(_POLL_SECONDS)
        found, now = _read(path), time.monotonic()
        if found != before:
            before, changed = found, now
        elif now - changed >= TERM_SECONDS:
            return True
        if changed > begun and found is not None and now - begun >= patience_seconds:
            return False
    return True


def remove_other_leases(root: Path, job: str) -> None:
    """Remove the leases of dead or fenced off jobs. Not collective.

    The caller has signed the lock. A lease that cannot be removed stays and does no harm.
    """
    with suppress(OSError):
        for name in filesystem.list_names(root):
            if leased_job(name) not in (None, job):
                filesystem.remove_file(root / name)


def _renewal(count: int) -> bytes:
    return f"{count:020d}\n".encode()


def _read(path: Path) -> bytes | None:
    with os_errors_as(SaveError, "reading the lease", path):
        try:
            return filesystem.read_start(path, _BYTES_MAX)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise SaveError(f"{error}: somebody has put it there; remove it") from error
