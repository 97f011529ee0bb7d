# SPDX-License-Identifier: Apache-2.0
"""The directory is moved while a job saves: away, away and back, or another takes its name.

At any call of the one module that changes files: some drawn ones in each run, all with
MPI_CKPT_TEST_STRESS=1.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil

import pytest

from mpi_ckpt.errors import CheckpointError, SaveError
from mpi_ckpt.storage.directory import catalog
from mpi_ckpt.storage.format.layout import generation_number
from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.crash import faults
from tests.crash.crashes import quiet_scratch
from tests.crash.faults import CALLS, misnumbered, numbers_in
from tests.crash.recorder import in_place_of_os
from tests.crash.replay import write_image
from tests.crash.world import Saved, Training, empty, leftovers
from tests.draws import COUNTS, SEED, STRESS, TIMES

KINDS = ("back soon", "back", "away", "empty", "older", "newer")
WORKLOADS = {
    workload.name: workload
    for workload in faults.workloads()
    if workload.name
    in ("save with prune", "sharing save", "asynchronous save", "direct save")
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """What is not shown is looked at again, after pauses in which nothing happens here."""
    monkeypatch.setattr(catalog, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))


class Moving:
    """An ``os`` before whose Nth call the directory is moved.

    Attributes:
        moved: Whether that has happened.
        elsewhere: Where it is then.
    """

    def __init__(self, root, nth, kind):
        self.root, self.elsewhere = root, root.parent / "elsewhere"
        self.moved = False
        self._kind = kind
        self._older = root.parent / "older"
        self._calls = itertools.count(1)
        self._nth = nth
        if kind in ("older", "newer"):
            shutil.copytree(root, self._older)
        if kind == "older":  # without what was saved last, but with the lock file
            shutil.rmtree(max(self._older.glob("checkpoint-*")))

    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in CALLS:
            return function

        def call(*args, **kwargs):
            number = next(self._calls)
            if number == self._nth:
                self._move()
            if number == self._nth + 2 and self._kind == "back soon":
                self.move_back()
            return function(*args, **kwargs)

        return call

    def _move(self):
        os.rename(self.root, self.elsewhere)
        self.moved = True
        if self._kind == "empty":
            os.mkdir(self.root)
        if self._kind in ("older", "newer"):
            os.rename(self._older, self.root)

    def move_back(self):
        """Bring the directory back, if it is not; what has its name goes aside."""
        if self.elsewhere.exists():
            if self.root.exists():
                os.rename(self.root, self.root.parent / "other")
            os.rename(self.elsewhere, self.root)


def problems_of(workload, nth, kind, sandbox):
    """Let the directory be moved at a call; return whether it was, and what is wrong."""
    empty(sandbox)
    write_image(workload.base, sandbox)
    root, wrong, error = sandbox / workload.root, [], None
    with Training(root, keep=workload.keep, **workload.options) as training:
        workload.prepare(training)
        before = training.restore()
        seen = numbers_in(root)
        moving = Moving(root, nth, kind)
        try:
            with in_place_of_os(moving):
                workload.act(training)
        except CheckpointError as raised:
            error = raised
            if not isinstance(error, SaveError) or str(root) not in str(error):
                wrong.append(f"no SaveError that names the directory: {error!r}")
        if moving.moved and kind == "away" and root.exists():
            wrong.append("the directory was made anew")
        moving.move_back()
        other = root.parent / "other"
        places = [place for place in (root, other) if place.exists()]
        wrong += [line for place in places for line in torn(place)]
        found = newest(training)
        if error is None and workload.after not in (found, *map(newest_in, places[1:])):
            wrong.append(f"acknowledged, and {found} came back")
        if found not in (before, workload.after):
            wrong.append(f"{found} came back, neither {before} nor {workload.after}")
        if kind == "empty" and other.exists() and numbers_in(other):
            wrong.append("published into another directory")
        wrong += misnumbered(seen, numbers_in(root))
        training.save(7)
    with Training(root) as training:
        if training.restore() != Saved.of(7):
            wrong.append("the next save does not come back")
        wrong += [f"left behind: {name}" for name in leftovers(root)]
    return moving.moved, wrong


def newest(training):
    try:
        return training.restore()
    except (CheckpointError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def newest_in(root):
    """Return what a new job restores there; the first one may think that it owns it."""
    with Training(root) as training:
        return newest(training)


def torn(root):
    """Return what of the published generations of a directory is not good."""
    found = []
    for path in root.iterdir():
        if generation_number(path.name) is not None:
            try:
                with GenerationReader(path) as reader:
                    verify(reader)
            except CheckpointError as error:
                found.append(f"torn: {error}")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_directory_that_is_moved_while_a_job_saves(name, kind):
    rng = random.Random(f"{SEED} {name} {kind}")
    turns = itertools.count(1) if STRESS else rng.sample(range(1, 40), 4 * TIMES)
    hit = 0
    with quiet_scratch() as sandbox:
        for nth in turns:
            moved, wrong = problems_of(WORKLOADS[name], nth, kind, sandbox)
            assert not wrong, f"{kind} before call {nth}: {wrong}"
            hit += moved
            if not moved and STRESS:
                break
    assert hit > 0
    COUNTS["moves of the directory"] += hit


def test_a_job_that_makes_its_directory_anew_is_found(monkeypatch):
    """The tester is tested: one that takes what has the name for its own."""
    monkeypatch.setattr(
        "mpi_ckpt.storage.owning.lock.DirectoryLock.check", lambda self: None
    )
    monkeypatch.setattr(catalog.Catalog, "_hidden", lambda *_: "")
    with quiet_scratch() as sandbox:
        found = [
            line
            for nth in range(1, 6)
            for line in problems_of(WORKLOADS["direct save"], nth, "empty", sandbox)[1]
        ]
    assert "published into another directory" in found
