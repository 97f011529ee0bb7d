# SPDX-License-Identifier: Apache-2.0
"""A job of one rank that does what it reads from its standard input, and answers each.

Arguments: ``job`` or ``reader`` (which does without the lock), and a checkpoint directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpi_ckpt.errors import CheckpointError, SaveError
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.owning import ownership
from tests.crash.faults import quiet
from tests.crash.moments import Changes, Moment
from tests.crash.recorder import in_place_of_os
from tests.crash.world import Saved, Training, leftovers

PAGE = 4096


class Worker:
    """What can be asked for: the public methods."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: Training | None = None

    @property
    def _training(self) -> Training:
        if self._open is None:
            self._open = Training(self._root)
        return self._open

    def save(self, step: int) -> None:
        self._training.save(step)

    def restore(self) -> int | None:
        """Restore; answer the step, or None if there is nothing."""
        found = self._training.restore()
        if found is not None and found != Saved.of(found.step):
            raise ValueError(f"a mixture: {found}")
        return found and found.step

    def save_counted(self, step: int) -> int:
        """Save; answer how often that changes the file system."""
        changes = Changes(Moment(0, "never"), lambda: None)
        with in_place_of_os(changes):
            self._training.save(step)
        return changes.count

    def save_while_server_stops(self, step: int, number: int, when: str) -> None:
        """Save; before, inside or after that change of the file system the server stops."""
        with in_place_of_os(Changes(Moment(number, when), stop_server)):
            self._training.save(step)

    def lose_lock(self) -> None:
        """Be without the lock and not know, as a client is that was cut off for long."""
        lock = self._training.manager._session.directory._lock
        fcntl.flock(lock._descriptor, fcntl.LOCK_UN)

    def leftovers(self) -> list[str]:
        return leftovers(self._root)

    def features(self) -> dict[str, bool]:
        """Answer what the library finds this file system able to do."""
        return features(self._root / "features")

    def close(self) -> None:
        self._training.manager.close()
        self._open = None


def stop_server() -> None:
    subprocess.run([os.environ["NFS_SERVER"], "stop"], check=True)


def features(folder: Path) -> dict[str, bool]:
    folder.mkdir()
    path, pages = folder / "file", np.ones(2 * PAGE, np.uint8)
    aligned = pages[-pages.ctypes.data % PAGE :][:PAGE]
    found = {}
    with filesystem.create_file(path, direct=True) as descriptor:  # raises where it cannot
        found["reserves space"] = filesystem.reserve(descriptor, PAGE)
        filesystem.write_all(descriptor, memoryview(aligned), 0)
        filesystem.sync_file(descriptor)
    found["writes around the cache"] = path.read_bytes() == aligned.tobytes()
    filesystem.link_file(path, folder / "link")
    found["links"] = path.stat().st_nlink == 2
    taken = folder.with_name("taken")
    taken.mkdir()
    (taken / "file").touch()
    try:
        os.rename(folder, taken)
        found["refuses a taken name"] = False
    except OSError:
        found["refuses a taken name"] = True
    filesystem.remove_tree(folder)
    filesystem.remove_tree(taken)
    return found


def refuse(*_: Any, **__: Any) -> None:
    raise SaveError("as if the directory were mounted read-only")


def main() -> None:
    role, root = sys.argv[1], Path(sys.argv[2])
    if role == "reader":
        ownership.DirectoryLock = refuse  # type: ignore[assignment,misc]
    with quiet():
        worker = Worker(root)
        for line in sys.stdin:
            verb, *arguments = json.loads(line)
            began = time.monotonic()
            try:
                told = {"value": getattr(worker, verb)(*arguments)}
            except (CheckpointError, ValueError, OSError) as error:
                told = {"error": type(error).__name__, "message": str(error)}
            print(json.dumps({**told, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
