# SPDX-License-Identifier: Apache-2.0
"""Real power cuts: a file system is shut down in mid-save, then mounted again.

The kernel throws away what is not on disk and recovers the journal, as after a reset: it
is what ``xfs_io -x -c shutdown`` does, with ``-f`` where the journal is flushed before, so
that names are there whose bytes are not. ext4 is mounted with ``noauto_da_alloc``, for by
default it hides a missing fsync before a rename. ``scripts/powercut`` runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt import IO
from mpi_ckpt.errors import CheckpointError
from tests.crash.crashes import quiet_scratch
from tests.crash.moments import Changes, Moment
from tests.crash.recorder import in_place_of_os
from tests.crash.world import Saved, Training, judge
from tests.fuse import NotHereError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): ext4 and XFS have the same
SHUTDOWNS = {"shutdown": 2, "shutdown -f": 1}
WAYS: dict[str, dict[str, Any]] = {
    "blocking": {},
    "asynchronous": {"asynchronous": True},
    "direct": {"io": IO(mode="direct")},
}
_CANNOT_BE_DONE_HERE = 77
_SAVES = 3


@dataclass(frozen=True)
class Kind:
    """A kind of file system: how it is made, mounted, and had."""

    name: str
    make: str
    options: str
    mebibytes: int
    package: str


KINDS = (
    Kind("ext4", "mkfs.ext4 -qF", "loop,noauto_da_alloc", 24, "e2fsprogs"),
    Kind("xfs", "mkfs.xfs -qf", "loop", 320, "xfsprogs"),
)


class Disk:
    """A small file system in a file, mounted while it is used.

    Raises:
        NotHereError: If it cannot be made or mounted.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.kind = kind
        self.image, self.where = folder / f"{kind.name}.image", folder / kind.name
        if os.geteuid() != 0:
            raise NotHereError("mounting takes root")
        command = kind.make.split()
        if shutil.which(command[0]) is None:
            raise NotHereError(f"{command[0]} is missing: apt-get install {kind.package}")
        self.where.mkdir()
        with self.image.open("wb") as image:
            image.truncate(kind.mebibytes << 20)
        subprocess.run([*command, str(self.image)], check=True)
        with self.mounted():
            pass

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """Mount it for the block, also if power fails in it."""
        command = ["mount", "-o", self.kind.options, str(self.image), str(self.where)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotHereError(f"mounting is not allowed here: {done.stderr.strip()}")
        try:
            yield self.where / "ckpt"
        finally:
            subprocess.run(["umount", str(self.where)], check=True)

    def cut(self, how: str) -> None:
        """Lose power."""
        descriptor = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", SHUTDOWNS[how]))
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Cut:
    """Power fails in a job that saves in one of `WAYS`, in one of `SHUTDOWNS`.

    It does so inside a change (while the call runs, or when half of a write is done), after
    one, or ``acked``: after an acknowledgement.
    """

    way: str
    how: str
    moment: Moment

    def __str__(self) -> str:
        return f"{self.way}, {self.how} {self.moment.when} no. {self.moment.number}"


NEVER = Cut("blocking", "shutdown", Moment(0, "never"))


class Job:
    """Restores, saves three times; notes what was acknowledged.

    Attributes:
        saves: All saves, in order, that of the base first.
        acked: Index in ``saves`` of the last that was acknowledged.
    """

    def __init__(self, disk: Disk, cut: Cut, first: int) -> None:
        self.saves = [Saved.of(1)]
        self.acked = 0
        self._disk, self._cut, self._first = disk, cut, first
        self._is_cut = False

    def run(self, root: Path) -> int:
        """Do it until power fails, if it does; return the number of changes."""
        changes = Changes(self._cut.moment, self._lose_power)
        with in_place_of_os(changes):
            training = Training(root, keep=2, **WAYS[self._cut.way])
            try:
                training.restore()
                for step in range(self._first, self._first + _SAVES):
                    self._save(training, step)
            except CheckpointError:
                if not self._is_cut:
                    raise
            finally:
                training.manager.close()
        return changes.count

    def _save(self, training: Training, step: int) -> None:
        training.move(step)
        self.saves.append(Saved.of(step))
        training.manager.save(step).wait()
        # A machine without power tells nobody anything. Here the job lives on for a while,
        # and on XFS an fsync that runs beside the shutdown may still succeed.
        if not self._is_cut:
            self.acked = len(self.saves) - 1
        if not self._is_cut and self._cut.moment == Moment(self.acked, "acked"):
            self._lose_power()
        training.manager.wait()  # for what is pruned

    def _lose_power(self) -> None:
        self._is_cut = True  # from here on: the cut takes its time
        self._disk.cut(self._cut.how)


def count_changes(disk: Disk, way: str) -> int:
    """Return how many changes a job makes to which nothing happens."""
    with disk.mounted() as root:
        make_base(root)
        count = Job(disk, replace(NEVER, way=way), 2).run(root)
        shutil.rmtree(root)
    return count


def cut_and_judge(disk: Disk, cut: Cut, *, first: int = 10) -> str | None:
    """Let power fail in a job; say what is wrong with what the next one finds.

    Args:
        disk: Not mounted, empty.
        cut: When and how.
        first: Step of the first save of the job.
    """
    job = Job(disk, cut, first)
    with disk.mounted() as root:
        make_base(root)
        job.run(root)
    with disk.mounted() as root:
        fault = judge(root, job.saves, job.acked, next_step=first + _SAVES)
        shutil.rmtree(root)
    return fault


def make_base(root: Path) -> None:
    """Save once, so that there is something to lose."""
    with Training(root, keep=2) as training:
        training.save(1)


def all_cuts(disk: Disk) -> list[Cut]:
    """Return cuts at every change that jobs make, and after every acknowledgement."""
    cuts = []
    for way, how in itertools.product(WAYS, SHUTDOWNS):
        numbers = range(1, count_changes(disk, way) + 1)
        moments = [
            Moment(*drawn) for drawn in itertools.product(numbers, ("inside", "after"))
        ]
        moments += [Moment(number, "acked") for number in range(1, _SAVES + 1)]
        cuts += [Cut(way, how, moment) for moment in moments]
    return cuts


def run_cuts(disk: Disk, cuts: Sequence[Cut]) -> list[str]:
    """Judge the file system after each of some cuts; return what was bad."""
    bad = []
    for number, cut in enumerate(cuts):
        fault = cut_and_judge(disk, cut, first=10 * number + 10)
        if fault is not None:
            bad.append(f"{disk.kind.name}, {cut}: {fault}")
    return bad


def main() -> None:
    """Cut at every moment on every kind of file system; print a table."""
    parser = argparse.ArgumentParser(prog="scripts/powercut", description=__doc__)
    parser.parse_args()
    began = time.monotonic()
    bad: list[str] = []
    print(f"{'file system':14}{'saves':14}{'cut by':14}{'cuts':>6}{'bad':>6}")
    try:
        with quiet_scratch() as folder:
            for kind in KINDS:
                disk = Disk(folder, kind)
                cuts = all_cuts(disk)
                for way, how in itertools.product(WAYS, SHUTDOWNS):
                    some = [cut for cut in cuts if (cut.way, cut.how) == (way, how)]
                    found = run_cuts(disk, some)
                    row = f"{kind.name:14}{way:14}{how:14}{len(some):6}{len(found):6}"
                    print(row, flush=True)
                    bad += found
    except NotHereError as error:
        print(f"scripts/powercut: {error}", file=sys.stderr)
        sys.exit(_CANNOT_BE_DONE_HERE)
    print(f"{time.monotonic() - began:.0f} s", *bad, sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
