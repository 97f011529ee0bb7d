# SPDX-License-Identifier: Apache-2.0
"""Saves, shares, prunes, restores and falls back on one odd disk after the other.

Arguments: folder of the disk, which is mounted (`tests.odd_disk`); the directory behind it;
file with the cases as JSON; file for what came of them, a line for each. A case is the
switches of the disk, and the options of the manager. A listing whose ``at`` is 0 lies in
each turn, until none is left.
"""

import itertools
import json
import os
import sys
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt import IO
from mpi_ckpt.errors import CheckpointError
from tests.crash.faults import quiet
from tests.crash.world import Saved, Training, leftovers, pretend_hosts
from tests.odd_disk import OddDisk

folder, backing, asked, told = map(Path, sys.argv[1:])
disk = OddDisk(folder, backing)
comm = MPI.COMM_WORLD
is_root = comm.rank == 0
pretend_hosts(comm)
numbers = itertools.count()
ALL = ("arrays", "plain")


class Story:
    """What a job does on a disk, and what came of it."""

    def __init__(self, options: dict) -> None:
        # Of its own: an old listing is one of this story.
        self.name = f"ckpt-{next(numbers)}"
        self.io = IO(**options.pop("io", {}))
        self.options = {"deadline_seconds": 60, "comm": comm, **options}
        self.acked: list[Saved] = []
        self.told: list[tuple[str, object]] = []
        self.wrong: list[str] = []

    def start(self, keep: int) -> Training:
        return Training(disk.path / self.name, keep=keep, io=self.io, **self.options)

    def attempt(self, doing: str, act, expected) -> bool:
        """Note what came of an act: its result, or an error."""
        try:
            found = act()
        except CheckpointError as error:
            self.told.append((doing, f"{type(error).__name__}: {error}"))
            return False
        self.told.append((doing, None))
        if found != expected:
            self.wrong.append(f"{doing}: {found}, expected {expected}")
        return True

    def save(self, training: Training, step: int, moved=ALL, only=None) -> None:
        last = self.acked[-1] if self.acked else Saved.of(0)
        training.move(step, moved)
        holds = Saved(step, *(step if n in moved else getattr(last, n) for n in ALL))

        def act() -> None:
            training.manager.save(step, only=only).wait()
            training.manager.wait()  # also for what is pruned

        if self.attempt(f"save {step}", act, None):
            self.acked.append(holds)

    def restore(self, doing: str) -> None:
        """Start anew, and require what was acknowledged last."""
        with self.start(2) as training:
            expected = self.acked[-1] if self.acked else None
            self.attempt(doing, training.restore, expected)


def tell(story: Story) -> None:
    with story.start(2) as training:
        story.attempt("first restore", training.restore, None)
        for step, moved in ((1, ALL), (2, ["plain"]), (3, ["plain"]), (4, ["arrays"])):
            # What it holds where a save was refused is of that step: all is set again.
            if not story.acked or story.acked[-1].step != step - 1:
                moved = ALL
            story.save(training, step, moved)
        if story.acked:  # by a link, or a copy, of the whole file of the others
            story.save(training, 5, ["plain"], only=["plain"])
    story.restore("restore")
    damage(story)
    story.restore("fallback")


def damage(story: Story) -> None:
    """Spoil the newest generation behind the disk's back, if there are two to choose of."""
    told = None
    if is_root and len(story.acked) > 1:
        names = [name for name in os.listdir(disk.backing / story.name) if name[0] == "c"]
        if len(names) > 1:
            told = max(names)
            path = disk.backing / story.name / told / "manifest.json"
            path.write_bytes(path.read_bytes()[:-1])
    if comm.bcast(told):
        del story.acked[-1]


def end(story: Story) -> None:
    """The disk is a good one again: nothing acknowledged is lost, and all goes on."""
    story.restore("last restore")
    with story.start(2) as training:
        story.save(training, 9)
        if story.acked[-1:] != [Saved.of(9)]:
            story.wrong.append("the save on a good disk was refused")
        if is_root and (left := leftovers(disk.path / story.name)):
            story.wrong.append(f"left behind: {left}")
    story.restore("restore of the last")


def go_through(switches: dict, options: dict) -> list[str]:
    """Go through a case; return which turns of a listing have come."""
    if is_root:
        disk.be(**dict.fromkeys(SWITCHES))
        disk.fired()
        disk.be(**switches)
    comm.Barrier()
    story = Story(dict(options))
    tell(story)
    comm.Barrier()
    fired = comm.bcast(disk.fired() if is_root else None)
    if is_root:
        disk.be(**dict.fromkeys(SWITCHES))
    comm.Barrier()
    calm = len(story.told)
    end(story)
    story.wrong += [f"on a good disk: {line}" for line in story.told[calm:] if line[1]]
    gathered = comm.gather((story.told, story.wrong))
    if is_root:
        report = {
            "case": [switches, options],
            "fired": fired,
            "told": [told for told, _ in gathered],
            "wrong": [line for _, wrong in gathered for line in wrong],
        }
        print(json.dumps(report), file=lines, flush=True)
    return fired


SWITCHES = (
    *("flock", "link", "direct", "sync_dir", "open_dir", "sync_file", "sync_seconds"),
    *("fallocate", "listing", "open"),
)

with quiet(), told.open("w") if is_root else open(os.devnull, "w") as lines:
    for switches, options in json.loads(asked.read_text()):
        listing = switches.get("listing", {})
        if listing.get("at") != 0:
            go_through(switches, options)
            continue
        for turn in itertools.count(1):
            if not go_through({"listing": {**listing, "at": turn}}, options):
                break
