# SPDX-License-Identifier: Apache-2.0
"""Power cuts at every moment: all that the model allows is loaded with the library.

By default root alone touches files, so the operations of a job do not depend on its number
of ranks; most are recorded with one rank here. `test_operations_do_not_depend_on_ranks`
shows it. Every way to write is recorded on all of 1, 2 and 4 ranks as well.
"""

from __future__ import annotations

import errno
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mpi_ckpt.errors import CheckpointError
from tests.crash import scenarios
from tests.crash.crashes import Scenario, judge_crashes, record, saved_image
from tests.crash.faults import Fault, Faulty
from tests.crash.recorder import from_json
from tests.crash.replay import crash_images
from tests.draws import JUDGED, SEED, STRESS, TIMES
from tests.launch import run_job

SAMPLES = 200 if STRESS else 30 * TIMES  # states out of order, after each operation
FEW = 100 if STRESS else 12 * TIMES
LEAST = 5000

pytestmark = pytest.mark.timeout(1800 if STRESS else 300 * TIMES)

# Scenario -> distinct crash states that must be judged at least.
RUNS = {
    "first save": (scenarios.first_save, 30),
    "next save": (scenarios.next_save, 60),
    "prune to 1": (lambda: scenarios.saves_that_prune(1), 125),
    "prune to 2": (lambda: scenarios.saves_that_prune(2), 125),
    "carry": (scenarios.saves_that_carry, 125),
    "share": (scenarios.saves_that_share, 125),
    "direct": (scenarios.direct_saves, 70),
    "asynchronous": (scenarios.saves_behind_the_training, 125),
    "overlapped": (lambda: scenarios.saves_behind_the_training(overlap=True), 125),
    "plain states": (scenarios.saves_of_plain_states, 90),
    "adaptdl": (scenarios.saves_through_adaptdl, 125),
    "quarantine of a cut file": (lambda: scenarios.quarantine("cut"), 45),
    "quarantine of a flipped bit": (lambda: scenarios.quarantine("flipped"), 45),
    "quarantine without manifest": (lambda: scenarios.quarantine("gone"), 45),
    "sweep": (scenarios.sweep, 110),
}

PROGRAM = str(Path(__file__).parent / "programs" / "record.py")


# One writer of a job of one rank is the others' ways as well, as is tested below. Four do
# nothing that two do not when the copy comes late.
WRITERS = [
    (ranks, way)
    for ranks in (1, 2, 4)
    for way in scenarios.WRITERS_WAYS
    if (ranks > 1 or way.startswith("root")) and (ranks, way) != (4, "all overlapped")
]


@pytest.mark.parametrize("name", RUNS)
def test_every_crash_state_is_good(name):
    make, least = RUNS[name]
    result = judge_crashes(make(), SEED, samples=SAMPLES)
    assert not result.bad, str(result)
    assert result.states >= least


@pytest.mark.mpi
@pytest.mark.parametrize(("ranks", "way"), WRITERS)
def test_every_crash_state_of_writers_is_good(ranks, way):
    scenario = scenarios.saves_of_writers(ranks, way)
    writers = {op.path.rpartition("/")[2] for op in scenario.ops if op.kind == "create"}
    numbers = {"root": [0], "node": [0, 2] if ranks == 4 else range(ranks)}
    expected = {f"rank-{n:05d}.safetensors" for n in numbers.get(way[:4], range(ranks))}
    assert writers - {"manifest.json", "plain.bin"} == expected
    result = judge_crashes(scenario, SEED, samples=SAMPLES)
    assert not result.bad, str(result)
    assert result.states >= 150


# The way in which the other leaves are written makes no difference to a file of tiles.
TILES = [(2, "root blocking"), (2, "all overlapped"), (3, "root asynchronous")]
MORE_TILES = [
    (ranks, way)
    for ranks in (2, 3)
    for way in scenarios.TILES_WAYS
    if (ranks, way) not in TILES
]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "way"),
    [*TILES, *(pytest.param(*more, marks=pytest.mark.long) for more in MORE_TILES)],
)
def test_every_crash_state_of_tiles_is_good(ranks, way):
    """The base was saved by one rank, and one rank restores what several have saved."""
    scenario = scenarios.saves_of_writers(ranks, way, cut=True)
    for rank in range(ranks):
        file = f"/tiles-{rank:05d}.safetensors"
        own = [op for op in scenario.ops if op.path.endswith(file)]
        syncs = [number for number, op in enumerate(own) if op.kind == "sync_file"]
        # Two of the saves change the tiles; the others share the file by a second name.
        assert len(syncs) == 2
        # The header is written last, and then comes the file's only fsync.
        for number in syncs:
            assert own[number - 1].kind == "pwrite"
            assert own[number - 1].offset == 0 < own[number - 2].offset
    samples = FEW if (ranks, way) in TILES else SAMPLES
    result = judge_crashes(scenario, SEED, samples=samples)
    assert not result.bad, str(result)
    assert result.states >= 150


@pytest.mark.mpi
@pytest.mark.parametrize("writers", ["node", "all"])
@pytest.mark.parametrize("way", ["blocking", "asynchronous"])
def test_one_rank_writes_as_root_does_whoever_is_to_write(writers, way):
    def recorded(writers):
        ops = scenarios.recorded_on_all_ranks(1)[f"{writers} {way}"]
        return sorted(essence(ops))  # a prune is behind the training: no certain order

    assert recorded(writers) == recorded("root")


def test_crash_while_recovering_from_a_crash():
    rng = random.Random(SEED)
    firsts = [make() for make, _ in RUNS.values()]
    firsts += [
        scenarios.saves_of_writers(*writer) for writer in WRITERS if "root" not in writer[1]
    ]
    firsts += [scenarios.saves_of_writers(*writer, cut=True) for writer in TILES]
    for first in firsts:
        images = list(crash_images(first.base, first.ops, rng, samples=SAMPLES))
        for done, _, image in rng.sample(images, 20 if STRESS else 3):
            second = scenarios.recovery(first, done, image)
            result = judge_crashes(second, SEED, samples=4, limit=FEW)
            assert not result.bad, str(result)


def test_power_cut_after_a_kill_and_a_recovery():
    """A kill loses nothing, but leaves what was not fsynced to the next process."""
    rng = random.Random(SEED)
    for make, _ in RUNS.values():
        first = make()
        moments = range(len(first.ops) + 1)
        for done in moments if STRESS else rng.sample(moments, 4):
            both = scenarios.killed_then_recovered(first, done)
            result = judge_crashes(both, SEED, samples=4, limit=FEW)
            assert not result.bad, str(result)


def failed_save(fault: Fault, *, first: bool) -> tuple[Scenario, bool]:
    """Record two saves of which a call fails; return whether it did."""
    base, saves = ({}, []) if first else saved_image([1])
    faulty = []

    def program(run):
        with run.start(keep=1) as training:
            for step in (11, 12):
                try:
                    run.save(training, step)
                except CheckpointError:
                    continue

    def wrap(recorder):
        faulty.append(Faulty(fault, recorder))
        return faulty[0]

    scenario = Scenario(f"{fault}, then crash", base, saves=saves, acked=len(saves) - 1)
    record(scenario, program, wrap)
    faulty[0].close_kept()
    return scenario, faulty[0].fired > 0


@pytest.mark.parametrize("first", [True, False], ids=["first save", "next save"])
def test_power_cut_after_a_failed_call(first):
    for call in ("open", "pwrite", "fsync", "mkdir", "rename", "unlink"):
        numbers = range(1, 100)
        for number in numbers:
            scenario, fired = failed_save(Fault(call, number, errno.EIO), first=first)
            if not fired:
                break
            result = judge_crashes(scenario, SEED, samples=3, limit=FEW // 2)
            assert not result.bad, str(result)
        assert number > 1


def test_enough_states_were_judged(request):
    """The last one of those that judge: says what all of them have come to."""
    config = request.config
    if config.option.keyword or any("::" in argument for argument in config.args):
        pytest.skip("only some of the tests were asked for")
    assert len(JUDGED) >= LEAST


def test_states_are_drawn_by_the_seed():
    scenario = scenarios.next_save()

    def states(seed):
        return [
            str(image)
            for image in crash_images(scenario.base, scenario.ops, seed, samples=5)
        ]

    assert states(random.Random(1)) == states(random.Random(1))
    assert states(random.Random(1)) != states(random.Random(2))


def essence(ops):
    """Return operations without what differs between any two jobs: its name, the time."""
    numbers = {}
    for op in ops:
        path, target = (re.sub(r"-[0-9a-f]{12}", "-JOB", p) for p in (op.path, op.target))
        data = b"" if path.endswith("manifest.json") else op.data
        file = numbers.setdefault(op.file, len(numbers))
        yield str(replace(op, path=path, target=target, file=file, data=data)), data


@pytest.mark.mpi
def test_operations_do_not_depend_on_ranks(tmp_path):
    recorded = {}
    for ranks in (1, 2, 3):
        out = tmp_path / f"ops-{ranks}"
        outcome = run_job(ranks, [PROGRAM, str(tmp_path / f"disk-{ranks}"), str(out)])
        assert outcome.code == 0, outcome.text
        recorded[ranks] = list(essence(from_json(out.read_text())))
    assert {op.split()[0] for op, _ in recorded[1]} >= {"link", "rename", "unlink"}
    assert recorded[1] == recorded[2] == recorded[3], sys.executable
