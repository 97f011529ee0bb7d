# SPDX-License-Identifier: Apache-2.0
"""A run of a job, recorded; and the states that a crash in it may leave, judged."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.crash.recorder import Recorder, in_place_of_os
from tests.crash.replay import (
    Choice,
    Model,
    crash_images,
    image_digest,
    read_image,
    write_image,
)
from tests.crash.world import STATES, Saved, Training, empty, judge, scratch
from tests.draws import JUDGED

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from tests.crash.recorder import Op
    from tests.crash.replay import Image

ROOT = "ckpt"


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
        cut: Whether there is state that is cut over the ranks.
    """

    name: str
    base: Image = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    saves: list[Saved] = field(default_factory=list)
    acked: int = -1
    root: str = ROOT
    bad: frozenset[str] = frozenset()
    cut: bool = False

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
        return Training(self.root, cut=self.scenario.cut, **options)

    def save(
        self,
        training: Training,
        step: int,
        *,
        only: Collection[str] | None = None,
        moved: Collection[str] = STATES,
        level: str = "directory",
    ) -> None:
        """Bring some states to a step, save all or some, and note the acknowledgement."""
        number, report = self.start_save(
            training, step, only=only, moved=moved, level=level
        )
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
        level: str = "directory",
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
        return len(self.scenario.saves) - 1, training.manager.save(
            step, only=only, level=level
        )


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


def saved_image(steps: list[int], *, cut: bool = False) -> tuple[Image, list[Saved]]:
    """Return an image with one generation of each step, and what they hold."""
    return dict(_saved_image(tuple(steps), cut=cut)), [Saved.of(step) for step in steps]


@functools.cache
def _saved_image(steps: tuple[int, ...], *, cut: bool) -> Image:
    sandbox = scratch()
    try:
        with Training(sandbox / ROOT, keep=9, cut=cut) as training:
            for step in steps:
                training.save(step)
        return read_image(sandbox)
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
    # What an image has in common with others is the same object, whose hash is known.
    distinct: dict[tuple[frozenset[Any], int], tuple[int, Choice, Image]] = {}
    for done, choice, image in crash_images(
        scenario.base, scenario.ops, rng, samples=samples
    ):
        key = (frozenset(image.items()), scenario.acked_after(done))
        distinct.setdefault(key, (done, choice, image))
    states = list(distinct.values())
    if limit is not None and len(states) > limit:
        states = rng.sample(states, limit)
    digests = [image_digest(image) for _, _, image in states]
    JUDGED.update(digests)
    result = Result(len(set(digests)))
    judged: set[tuple[bytes, int]] = set()
    gone_on: set[bytes] = set()
    with quiet_scratch() as sandbox:
        for digest, (done, choice, image) in zip(digests, states, strict=True):
            # Two that only a job's name or the time tells apart are one.
            state = (digest, scenario.acked_after(done))
            if state in judged:
                continue
            judged.add(state)
            fault = judge_image(scenario, done, image, sandbox, gone_on)
            if fault is not None:
                last = scenario.ops[done - 1] if done else "nothing"
                result.bad.append(
                    f"{fault}\n    {scenario.name}, seed {seed}: crash after operation "
                    f"{done} ({last}), names {choice.names}, data {choice.data}"
                )
    return result


def judge_image(
    scenario: Scenario,
    done: int,
    image: Image,
    sandbox: Path,
    gone_on: set[bytes],
) -> str | None:
    """Start again in an image, made real in a sandbox; see `judge`."""
    empty(sandbox)
    write_image(image, sandbox)
    return judge(
        sandbox / scenario.root,
        scenario.saves,
        scenario.acked_after(done),
        bad=scenario.bad,
        cut=scenario.cut,
        gone_on=gone_on,
    )


@contextlib.contextmanager
def quiet_scratch() -> Iterator[Path]:
    """Give a directory in memory; keep the warnings of thousands of recoveries out."""
    sandbox = scratch()
    logger = logging.getLogger("mpi_ckpt")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield sandbox
    finally:
        logger.setLevel(level)
        shutil.rmtree(sandbox)
