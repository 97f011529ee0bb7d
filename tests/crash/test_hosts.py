# SPDX-License-Identifier: Apache-2.0
"""Power cuts and kills in saves to hosts: each host alone goes on from the last one kept.

Two hosts with disks of their own save, blocking or behind the training, to themselves and
to the directory, go on twice, and are rescued. A power cut leaves any state of both disks
and of the directory; a kill leaves all that was done.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.crash.crashes import empty, quiet_scratch
from tests.crash.hosts import HOSTS, judge_host, judge_pairs, saves_on_hosts
from tests.crash.replay import Model, crash_images, image_digest, write_image
from tests.draws import JUDGED, SEED, STRESS, TIMES

# With cut state there is all that there is without, and more.
WAYS = [
    *("blocking cut", "asynchronous cut"),
    *(pytest.param(way, marks=pytest.mark.long) for way in ("blocking", "asynchronous")),
]
STATES = 5000 if STRESS else 120 * TIMES

pytestmark = pytest.mark.timeout(1800 if STRESS else 300 * TIMES)


def judge(scenario, states):
    """Start again on each host in each state; return what is wrong."""
    wrong = []
    with quiet_scratch() as sandbox:
        for done, image in states:
            JUDGED.add(image_digest(image))
            for host in HOSTS:
                empty(sandbox)
                write_image(image, sandbox)
                acked = scenario.acked_after(done)
                fault = judge_host(host, sandbox, scenario, acked)
                if fault is not None:
                    last = scenario.ops[done - 1] if done else "nothing"
                    wrong.append(f"{fault} on {host}, after operation {done} ({last})")
    return wrong


def draw(scenario, rng, count):
    """Return some of the states that a power cut may leave, with the moment of each."""
    images = crash_images(scenario.base, scenario.ops, rng, samples=2)
    distinct = {}
    for done, _, image in images:
        key = frozenset(image.items()), scenario.acked_after(done)
        distinct.setdefault(key, (done, image))
    states = list(distinct.values())
    return rng.sample(states, min(count, len(states)))


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_power_cuts_of_all_hosts(way):
    scenario = saves_on_hosts(way)
    states = draw(scenario, random.Random(SEED), STATES)
    assert len(states) == STATES or STRESS
    wrong = judge(scenario, states)
    assert not wrong, "\n".join(wrong[:10])


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_power_cuts_of_all_hosts_and_damage_to_one(way):
    scenario = saves_on_hosts(way)
    states = draw(scenario, random.Random(SEED + 1), STATES)
    wrong = judge_pairs(scenario, SEED, states)
    assert not wrong, "\n".join(wrong[:10])


@pytest.mark.parametrize("forgotten", ["sync_dir", "sync_file"])
def test_a_save_that_does_not_sync_on_a_host_is_found(forgotten):
    scenario = saves_on_hosts("blocking cut")
    ops = [
        op
        for op in scenario.ops
        if op.kind != forgotten or not op.path.startswith("local/host0/")
    ]
    bad = replace(scenario, ops=ops)
    alone, damaged = [], []
    # Which of two hosts comes first differs between runs, so a few states may all be good.
    for seed in range(SEED, SEED + 10):
        states = draw(bad, random.Random(seed), 40)
        alone += judge(bad, states)
        # Both hosts together need it only if the other one is damaged.
        damaged += judge_pairs(bad, seed, states)
        if all(any(map(_is_loss, wrong)) for wrong in (alone, damaged)):
            break
    assert any(map(_is_loss, alone))
    assert any(map(_is_loss, damaged))
    assert not any("on host1" in line for line in alone)
    assert all("of host1" in line for line in damaged)


def _is_loss(wrong: str) -> bool:
    return wrong.startswith(("LOST", "NONE"))


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_kills_between_any_two_changes_of_names(way):
    scenario = saves_on_hosts(way)
    names = {"rename", "unlink", "rmdir", "link"}
    moments = [
        done for done, op in enumerate(scenario.ops) if op.kind in names
    ]  # before each of them
    assert sum(scenario.ops[done].kind == "rename" for done in moments) >= 20
    if "blocking" in way and not STRESS and TIMES == 1:
        moments = moments[::2]
    model, states, applied = Model(scenario.base), [], 0
    for done in moments:
        for op in scenario.ops[applied:done]:
            model.apply(op)
        applied = done
        states.append((done, model.seen()))
    wrong = judge(scenario, states)
    assert not wrong, "\n".join(wrong[:10])
