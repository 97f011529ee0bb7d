# SPDX-License-Identifier: Apache-2.0
"""Trainings on hosts that come and go take the newest that is whole, and nothing else.

The choice is also replaced by choices with a bug each: the model must find them all.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from mpi_ckpt.engine.hosts.completable import LocalChoice, choose, gather
from mpi_ckpt.storage.local.lineage import Lineage
from tests.draws import SEED, TIMES
from tests.local.history import World


class Trainings(RuleBasedStateMachine):
    """Starts, saves cut off between renames, lost disks, hosts that come back."""

    is_running = False

    @initialize(hosts=st.integers(2, 5), copies=st.integers(1, 3), racks=st.integers(1, 5))
    def begin(self, hosts, copies, racks):
        domains = [f"rack{host % racks}" for host in range(hosts)]
        self.world = World(hosts, copies, domains)

    @rule(data=st.data())
    def start(self, data):
        every = list(range(self.world.hosts))
        present = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
        self.world.start(present)
        self.is_running = True

    @precondition(lambda self: self.is_running)
    @rule(data=st.data())
    def save_locally(self, data):
        named = data.draw(st.integers(0, len(self.world.present)))
        self.is_running = self.world.save_locally(named)

    @precondition(lambda self: self.is_running)
    @rule()
    def keep_locally(self):
        assert self.world.save_locally(len(self.world.present))

    @precondition(lambda self: self.is_running)
    @rule()
    def save_to_directory(self):
        self.world.save_to_directory()

    @precondition(lambda self: self.is_running)
    @rule(step=st.sampled_from(["begin_copy", "note_copy", "publish_copy"]))
    def copy(self, step):
        getattr(self.world, step)()

    @precondition(lambda self: not self.is_running)
    @rule(host=st.integers(0, 4))
    def wipe(self, host):
        self.world.wipe(host % self.world.hosts)

    @precondition(lambda self: not self.is_running)
    @rule(host=st.integers(0, 4))
    def damage(self, host):
        self.world.damage(host % self.world.hosts)


TestTrainings = Trainings.TestCase
TestTrainings.settings = settings(max_examples=150 * TIMES, stateful_step_count=30)


def play(seed, pick=choose):
    """Play one random training of some dozen starts; return the world."""
    draw = random.Random(f"{SEED} {seed}")
    hosts = draw.randint(2, 5)
    racks = draw.randint(1, hosts)
    domains = [f"rack{host % racks}" for host in range(hosts)]
    world = World(hosts, draw.randint(1, 3), domains, pick)
    for _ in range(12):
        some = draw.sample(range(hosts), draw.randint(1, hosts))
        world.start(some if draw.random() < 0.6 else range(hosts))
        for _ in range(draw.randint(0, 5)):
            steps = ["begin_copy", "begin_copy", "publish_copy", "note_copy"]
            if draw.random() < 0.8:
                getattr(world, draw.choice(steps))()
            if draw.random() < 0.2:
                world.save_to_directory()
            elif not world.save_locally(
                len(world.present)
                if draw.random() < 0.7
                else draw.randint(0, len(world.present))
            ):
                break
        if draw.random() < 0.3:
            draw.choice([world.wipe, world.damage])(draw.randrange(hosts))
    return world


def test_thousands_of_starts_take_the_newest_that_is_whole():
    worlds = [play(seed) for seed in range(400 * TIMES)]
    # Else the model would not show much.
    assert sum(world.locals_taken for world in worlds) > 800
    assert sum(world.branched for world in worlds) > 200
    assert sum(world.copies_published for world in worlds) > 100


def without_lineage(holdings, lineage, *, newest, copied):
    """Take any run's generation: a host that comes back brings an abandoned branch."""
    holdings = list(holdings)
    runs = () if lineage is None else lineage.runs
    free = tuple(replace(run, origin=None) for run in runs)
    found = [
        choose(holdings, Lineage("home", (run,)), newest=newest, copied=copied).chosen
        for run in free
    ]
    whole = [held for held in found if held is not None]
    return LocalChoice(max(whole, key=lambda held: held.origin[1:], default=None))


def without_completeness(holdings, lineage, *, newest, copied):
    """Take the newest that any host has some of."""
    verdict = choose(holdings, lineage, newest=newest, copied=copied)
    return LocalChoice(verdict.lost[0] if verdict.lost else verdict.chosen)


def local_first(holdings, lineage, *, newest, copied):
    """Take what the hosts have, though the directory has a newer one."""
    return choose(holdings, lineage, newest=0, copied=None)


def without_limits(holdings, lineage, *, newest, copied):
    """Take all generations of each run on the way back, those it was left at too."""
    if lineage is not None:
        runs = [
            run if run.origin is None else replace(run, origin=run.origin._replace(
                base=1 << 40, number=1 << 40
            ))
            for run in lineage.runs
        ]  # fmt: skip
        lineage = Lineage("home", tuple(runs))
    return choose(holdings, lineage, newest=newest, copied=copied)


def oldest_run_first(holdings, lineage, *, newest, copied):
    """Order by numbers alone: numbers of runs on other hosts may be higher."""
    if lineage is None:
        return LocalChoice()
    limits = lineage.limits()
    whole = [
        held
        for held in gather(holdings)
        if held.is_whole and held.origin.run in limits and held.origin.base >= newest
    ]
    return LocalChoice(max(whole, key=lambda held: held.origin.number, default=None))


def copies_as_new(holdings, lineage, *, newest, copied):
    """Take a copy in the directory for newer than what hosts kept while it was made."""
    return choose(holdings, lineage, newest=newest)


@pytest.mark.parametrize(
    "bug",
    [
        *(without_lineage, without_completeness, local_first, without_limits),
        *(oldest_run_first, copies_as_new),
    ],
    ids=lambda bug: bug.__name__,
)
def test_the_model_finds_planted_bugs(bug):
    def play_all():
        for seed in range(400 * TIMES):
            play(seed, bug)

    with pytest.raises(AssertionError, match=r"incomplete|expected"):
        play_all()
