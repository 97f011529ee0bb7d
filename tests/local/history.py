# SPDX-License-Identifier: Apache-2.0
"""A model of trainings on hosts that come and go: what a start may restore.

Each save has a parent: the save that its run continued from. A run that has saved is the
*head*: what counts is the way back from it. All that a start may take is on that way, and
whole on the hosts at hand or in the directory; of these it must take the newest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mpi_ckpt.engine.hosts.completable import Holding, choose
from mpi_ckpt.engine.hosts.placement import (
    count_copies,
    place_files,
    place_own_files,
)
from mpi_ckpt.storage.local.lineage import CopiedGeneration, Lineage, LocalRun, Origin

FILES = 4


@dataclass(frozen=True)
class Saved:
    """One save of the model; ``number`` is 0 for one written to the directory."""

    origin: Origin
    parent: Saved | None
    age: int
    job: str = ""
    files: int = FILES

    @property
    def is_local(self):
        return self.origin.number > 0


@dataclass
class World:
    """Hosts, a directory, and the runs of one training."""

    hosts: int
    copies: int
    domains: list[str]
    pick: object = choose
    disks: list[dict] = field(init=False)
    directory: list[Saved] = field(default_factory=list)
    copying: Saved | None = None
    copies_published: int = 0
    lineage: Lineage | None = None
    head: Saved | None = None
    state: Saved | None = None
    run: str = ""
    job: str = ""
    source: Saved | None = None
    present: tuple[int, ...] = ()
    kept: list[int] = field(default_factory=list)
    clock: int = 0
    starts: int = 0
    locals_taken: int = 0
    branched: int = 0

    def __post_init__(self):
        self.disks = [{} for _ in range(self.hosts)]

    # --- what happens ------------------------------------------------------------------

    def start(self, present):
        """Start a job on some hosts; it restores the newest that it can complete."""
        self.present, self.run = tuple(sorted(set(present))), ""
        self.copying = None
        self.starts += 1
        self.job = f"job{self.starts}"
        verdict = self.pick(
            self._holdings(), self.lineage, newest=self.newest, copied=self._copied()
        )
        found = None
        if verdict.chosen is not None:
            holders = verdict.chosen.holders
            assert all(holders), "an incomplete generation was chosen"
            found = self._find(verdict.chosen.origin)
            self.locals_taken += 1
        elif self.directory:
            found = self.directory[-1]
        expected = self._expected()
        assert found == expected, f"restored {found}, expected {expected}"
        self.state = found
        # A program that restores from the directory learns the number alone.
        from_hosts = verdict.chosen is not None
        self.source = None
        if found is not None:
            written = Origin(found.job, self.newest, 0)
            self.source = found.origin if from_hosts else self._copied() or written
        self.kept = [found.origin.number] if found is not None and found.is_local else []

    def save_locally(self, named):
        """Save to the hosts; so many of them, in order, give it its name: maybe not all.

        Returns:
            Whether all did; else the job has been killed.
        """
        base = self.newest
        if not self.run:
            self._begin_run()
        number = 1 + max(
            (o.number for host in self.present for o in self.disks[host]), default=0
        )
        saved = self._save(Origin(self.run, base, number))
        here = [f"host{host}" for host in self.present]
        domains = [self.domains[host] for host in self.present]
        copies = count_copies(self.copies, domains)
        placed = [
            *place_files([10] * FILES, here, domains, copies, bound=[0]),
            *place_own_files(range(len(here)), here, domains, copies),
        ]
        for place, host in enumerate(self.present[:named]):
            held = [n for n, holders in enumerate(placed) if place in holders]
            self.disks[host][saved.origin] = (saved, tuple(held))
        if named < len(self.present):
            return False
        self.kept = [*self.kept, number][-2:]
        if len(self.kept) == 2:
            for host in self.present:
                disk = self.disks[host]
                self.disks[host] = {o: s for o, s in disk.items() if o.number in self.kept}
        return True

    def save_to_directory(self):
        self.copying = None  # a save to the directory never runs beside a copy
        saved = self._save(Origin(self.job, self.newest + 1, 0))
        self.directory.append(saved)

    def begin_copy(self):
        """Begin to copy the last save to the directory, if hosts keep it."""
        if (
            self.state is not None
            and self.state.is_local
            and self.state.origin.run == self.run
        ):
            self.copying = self.state

    def note_copy(self):
        """Enter the copy into the lineage: the next start may find this, and no copy."""
        if self.copying is None:
            return
        copied = CopiedGeneration(
            self.newest + 1, float(self.copying.age), self.copying.origin
        )
        self.lineage = self.lineage.with_copied(copied)

    def publish_copy(self):
        """Publish it; hosts may keep newer saves by now."""
        if self.copying is not None:
            self.note_copy()
            self.directory.append(self.copying)
            self.copies_published += self.copying != self.state
            self.copying = None

    def wipe(self, host):
        self.disks[host] = {}

    def damage(self, host):
        """Lose one file of each generation of a host."""
        self.disks[host] = {
            origin: (saved, held[1:]) for origin, (saved, held) in self.disks[host].items()
        }

    # --- what is true ------------------------------------------------------------------

    def _save(self, origin):
        self.clock += 1
        # Beside those of all ranks one of each host, with what its ranks have alone.
        files = FILES + len(self.present)
        self.state = self.head = Saved(origin, self.state, self.clock, self.job, files)
        return self.head

    @property
    def newest(self):
        """The number of the newest generation in the directory."""
        return len(self.directory)

    def _copied(self):
        if not self.directory or self.lineage is None:
            return None
        return self.lineage.source(self.newest, float(self.directory[-1].age))

    def _begin_run(self):
        """Enter the run into the lineage: from here on its way back is what counts."""
        self.run = f"run{self.starts}"
        lineage = self.lineage or Lineage("home")
        self.lineage = lineage.with_run(LocalRun(self.run, self.job, self.source))
        if self.head != self.state:
            self.branched += 1
        self.head = self.state

    def _way_back(self):
        found, saved = [], self.head
        while saved is not None:
            found.append(saved)
            saved = saved.parent
        return found

    def _expected(self):
        """Return the newest save on the way back that is whole."""
        for saved in self._way_back():
            # A newer one in the directory counts, even of a run that has not saved here.
            if saved in self.directory or self._is_whole(saved):
                return saved
        return None

    def _is_whole(self, saved):
        held = {
            file
            for host in self.present
            for file in self.disks[host].get(saved.origin, (None, ()))[1]
        }
        return len(held) == saved.files

    def _find(self, origin):
        (found,) = {disk[origin][0] for disk in self.disks for _ in (0,) if origin in disk}
        return found

    def _holdings(self):
        return [
            Holding(host, origin, str(saved.age), saved.age, saved.files, held)
            for host in self.present
            for origin, (saved, held) in self.disks[host].items()
        ]
