# SPDX-License-Identifier: Apache-2.0
"""What a job does to a checkpoint directory, recorded; and its crash states, judged."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.crash.recorder import Recorder, in_place_of_os, merge
from tests.crash.replay import (
    Choice,
    Model,
    crash_images,
    image_key,
    read_image,
    write_image,
)
from tests.crash.world import COUNTS, STATES, Saved, Training, empty, judge, scratch
from tests.launch import run_job

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from tests.crash.recorder import Op
    from tests.crash.replay import Image

ROOT = "ckpt"
RECORD_WRITERS = str(Path(__file__).parent / "programs" / "record_writers.py")


@dataclass
class Scenario:
    """A recorded run.

    Attributes:
        name: For messages.
        base: What was on disk before, durable.
        ops: What the run did; marks say which save was acknowledged.
        saves: Every save, in order, those of earlier runs first.
        acked: Index in ``saves`` of the last acknowledged before the run; -1 for none.
        root: The checkpoint directory in the sandbox.
        bad: Generations that were damaged on purpose.
    """

    name: str
    base: Image = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    saves: list[Saved] = field(default_factory=list)
    acked: int = -1
    root: str = ROOT
    bad: frozenset[str] = frozenset()

    def acked_after(self, done: int) -> int:
        """Return the index of the last save acknowledged within so many operations."""
        notes = [op.note for op in self.ops[:done] if op.kind == "mark"]
        return max([self.acked, *notes])


class Run:
    """A job in a sandbox whose operations are recorded, and its saves noted."""

    def __init__(self, scenario: Scenario, sandbox: Path, recorder: Recorder) -> None:
        self.scenario = scenario
        self.recorder = recorder
        self.root = sandbox / scenario.root

    def start(self, **options: object) -> Training:
        return Training(self.root, **options)

    def save(
        self,
        training: Training,
        step: int,
        *,
        only: Collection[str] | None = None,
        moved: Collection[str] = STATES,
    ) -> None:
        """Bring some states to a step, save all or some, and note the acknowledgement."""
        number, report = self.start_save(training, step, only=only, moved=moved)
        report.wait()
        self.recorder.mark(number)
        training.manager.wait()  # also for what is pruned behind the training

    def start_save(
        self,
        training: Training,
        step: int,
        *,
        only: Collection[str] | None = None,
        moved: Collection[str] = STATES,
    ) -> tuple[int, Any]:
        """As `save`, but only begun; return what to note once it is acknowledged."""
        training.move(step, moved)
        saved = training.holds(step)
        if only is not None:  # the rest is that of the newest generation
            last = self.scenario.saves[-1]
            saved = Saved(
                step,
                saved.arrays if "arrays" in only else last.arrays,
                saved.plain if "plain" in only else last.plain,
            )
        self.scenario.saves.append(saved)
        return len(self.scenario.saves) - 1, training.manager.save(step, only=only)


def record(
    scenario: Scenario,
    program: Callable[[Run], None],
    wrap: Callable[[Recorder], Any] = lambda recorder: recorder,
) -> Scenario:
    """Run a program on the scenario's base image; fill in what it did.

    Args:
        scenario: Its operations and saves are filled in.
        program: The job.
        wrap: Puts something between the library and the recorder, such as a fault.
    """
    sandbox = scratch()
    try:
        write_image(scenario.base, sandbox)
        recorder = Recorder(sandbox)
        with in_place_of_os(wrap(recorder)):
            program(Run(scenario, sandbox, recorder))
        scenario.ops = recorder.ops
        assert_explained(scenario, sandbox)
    finally:
        shutil.rmtree(sandbox)
    return scenario


def assert_explained(scenario: Scenario, sandbox: Path) -> None:
    """Require that nothing wrote to the sandbox that is missing from the record."""
    model = Model(scenario.base)
    for op in scenario.ops:
        model.apply(op)
    assert model.seen() == read_image(sandbox), "the record does not explain the disk"


def saved_image(steps: list[int], *, keep: int = 9) -> tuple[Image, list[Saved]]:
    """Return an image with one generation of each step, and what they hold."""
    sandbox = scratch()
    try:
        with Training(sandbox / ROOT, keep=keep) as training:
            for step in steps:
                training.save(step)
        return read_image(sandbox), [Saved.of(step) for step in steps]
    finally:
        shutil.rmtree(sandbox)


@dataclass
class Result:
    """What the crash states of a scenario showed."""

    states: int = 0
    bad: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> Counter[str]:
        return Counter(line.split()[0] for line in self.bad)

    def __str__(self) -> str:
        shown = "\n  ".join(self.bad[:10])
        return f"{len(self.bad)} bad of {self.states} crash states:\n  {shown}"


def judge_crashes(
    scenario: Scenario, seed: int, *, samples: int = 6, limit: int | None = None
) -> Result:
    """Load every distinct crash state of a scenario with the library itself.

    Args:
        scenario: A recorded one.
        seed: Draws the states that are out of order or torn.
        samples: How many of them after each operation.
        limit: Judge no more than so many, drawn at random; None for all.
    """
    rng = random.Random(f"{seed} {scenario.name}")
    distinct: dict[tuple[bytes, int], tuple[int, Choice, Image]] = {}
    for done, choice, image in crash_images(
        scenario.base, scenario.ops, rng, samples=samples
    ):
        key = (image_key(image), scenario.acked_after(done))
        distinct.setdefault(key, (done, choice, image))
    states = list(distinct.values())
    if limit is not None and len(states) > limit:
        states = rng.sample(states, limit)
    result = Result(len({image_key(image) for _, _, image in states}))
    COUNTS["distinct crash states"] += result.states
    sandbox = scratch()
    level = logging.getLogger("mpi_ckpt").level
    logging.getLogger("mpi_ckpt").setLevel(logging.CRITICAL)
    try:
        for done, choice, image in states:
            empty(sandbox)
            write_image(image, sandbox)
            fault = judge(
                sandbox / scenario.root,
                scenario.saves,
                scenario.acked_after(done),
                bad=scenario.bad,
            )
            if fault is not None:
                last = scenario.ops[done - 1] if done else "nothing"
                result.bad.append(
                    f"{fault}\n    {scenario.name}, seed {seed}: crash after operation "
                    f"{done} ({last}), names {choice.names}, data {choice.data}"
                )
    finally:
        logging.getLogger("mpi_ckpt").setLevel(level)
        shutil.rmtree(sandbox)
    return result


# What jobs do.


def first_save() -> Scenario:
    def program(run: Run) -> None:
        with run.start() as training:
            assert training.restore() is None
            run.save(training, 1)

    return record(Scenario("first save", root="made/on/the/way"), program)


def next_save() -> Scenario:
    base, saves = saved_image([1])

    def program(run: Run) -> None:
        with run.start() as training:
            training.restore()
            run.save(training, 2)
            run.save(training, 3)

    return record(Scenario("next save", base, saves=saves, acked=0), program)


def saves_that_prune(keep: int) -> Scenario:
    base, saves = saved_image([1, 2, 3])

    def program(run: Run) -> None:
        with run.start(keep=keep) as training:
            training.restore()
            for step in (4, 5, 6):
                run.save(training, step)

    return record(Scenario(f"prune to {keep}", base, saves=saves, acked=2), program)


def saves_that_carry() -> Scenario:
    base, saves = saved_image([1, 2])

    def program(run: Run) -> None:
        with run.start(keep=1) as training:
            training.restore()
            run.save(training, 3, only=["plain"])
            run.save(training, 4, only=["arrays"])
            run.save(training, 5, only=["arrays"])

    return record(Scenario("carry by hard link", base, saves=saves, acked=1), program)


def saves_that_share() -> Scenario:
    """Leaves that did not change are those of older generations, by hard link."""
    base, saves = saved_image([1, 2])

    def program(run: Run) -> None:
        with run.start(keep=1) as training:
            training.restore()
            run.save(training, 3, moved=["plain"])
            run.save(training, 4, moved=["plain"])
            run.save(training, 5, moved=["arrays"])
            run.save(training, 6, moved=[])

    scenario = record(Scenario("share by hard link", base, saves=saves, acked=1), program)
    assert sum(op.kind == "link" for op in scenario.ops) >= 3
    return scenario


def direct_saves() -> Scenario:
    """Written around the page cache: space is reserved, blocks are padded, then cut."""
    base, saves = saved_image([1])

    def program(run: Run) -> None:
        with run.start(io="direct", keep=2) as training:
            training.restore()
            run.save(training, 2)
            run.save(training, 3, only=["arrays"])

    scenario = record(Scenario("direct", base, saves=saves, acked=0), program)
    assert {"extend", "cut"} <= {op.kind for op in scenario.ops}
    return scenario


def saves_behind_the_training() -> Scenario:
    base, saves = saved_image([1])

    def program(run: Run) -> None:
        with run.start(keep=1, asynchronous=True) as training:
            training.restore()
            run.save(training, 2)
            number, pending = run.start_save(training, 3)
            later, last = run.start_save(training, 4)  # waits for the one before
            assert pending.finished
            run.recorder.mark(number)
            training.move(99)  # what is staged does not change any more
            last.wait()
            run.recorder.mark(later)

    return record(Scenario("asynchronous", base, saves=saves, acked=0), program)


def saves_of_several_writers(ranks: int, way: str) -> Scenario:
    """Every rank writes a file of its own; recorded on all of them, in one order."""
    base, saves = saved_image([1])
    scenario = Scenario(f"{ranks} writers, {way}", base, saves=saves, acked=0)
    sandbox = scratch()
    try:
        write_image(base, sandbox)
        out = sandbox / "records"
        outcome = run_job(ranks, [RECORD_WRITERS, str(sandbox), str(out), way])
        assert outcome.code == 0, outcome.text
        scenario.ops = merge(json.loads(out.read_text()))
        out.unlink()
        assert_explained(scenario, sandbox)
    finally:
        shutil.rmtree(sandbox)
    scenario.saves += [Saved.of(2), Saved(3, 2, 3), Saved.of(4)]
    files = {op.path.rpartition("/")[2] for op in scenario.ops if op.kind == "create"}
    assert files >= {f"rank-{rank:05d}.safetensors" for rank in range(ranks)}
    return scenario


def quarantine(damage: str) -> Scenario:
    """The newest generation is bad: seen when it is opened, or only when it is read."""
    base, saves = saved_image([1, 2])
    bad = f"{ROOT}/checkpoint-00000002"
    if damage == "cut":
        base[f"{bad}/plain.bin"] = base[f"{bad}/plain.bin"][:-1]
    elif damage == "flipped":
        shard = base[f"{bad}/rank-00000.safetensors"]
        base[f"{bad}/rank-00000.safetensors"] = shard[:-1] + bytes([shard[-1] ^ 1])
    else:
        del base[f"{bad}/manifest.json"]

    def program(run: Run) -> None:
        with run.start() as training:
            assert training.restore() == Saved.of(1)
            run.save(training, 3)

    names = frozenset({"checkpoint-00000002"})
    scenario = Scenario(f"quarantine, {damage}", base, saves=saves[:1], acked=0, bad=names)
    return record(scenario, program)


def sweep() -> Scenario:
    base, saves = saved_image([1, 2])
    for path, content in list(base.items()):  # what a killed save and a killed prune leave
        for source, leftover in (
            ("checkpoint-00000002", ".partial-00000003-0123456789ab"),
            ("checkpoint-00000001", ".partial-00000001-ba9876543210"),
        ):
            if source in path and "manifest" not in path:
                base[path.replace(source, leftover)] = content

    def program(run: Run) -> None:
        with run.start() as training:
            assert training.restore() == Saved.of(2)
            run.save(training, 3)

    return record(Scenario("sweep", base, saves=saves, acked=1), program)


def recovery(scenario: Scenario, done: int, image: Image, *, step: int = 50) -> Scenario:
    """Restore and save in what a crash left, so that this can crash in its turn."""

    def program(run: Run) -> None:
        with run.start(keep=1) as training:
            training.restore()
            run.save(training, step)

    again = Scenario(
        f"{scenario.name}, crash after {done}, recovery",
        image,
        saves=list(scenario.saves),
        acked=scenario.acked_after(done),
        root=scenario.root,
        bad=scenario.bad,
    )
    return record(again, program)


def killed_then_recovered(scenario: Scenario, done: int) -> Scenario:
    """A run is killed, nothing is lost; the next one recovers; then power fails.

    What the killed process had not fsynced is in the hands of the next one.
    """
    model = Model(scenario.base)
    for op in scenario.ops[:done]:
        model.apply(op)
    second = recovery(scenario, done, model.seen())
    return replace(
        second,
        name=f"{scenario.name}, killed after {done}, recovered",
        base=scenario.base,
        ops=[*scenario.ops[:done], *second.ops],
        acked=scenario.acked,
    )
