# SPDX-License-Identifier: Apache-2.0
"""What jobs do to a checkpoint directory, each recorded in a way of its own."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from mpi_ckpt import ArrayState, KeepLast, Options, checkpoint
from mpi_ckpt.options import IO
from tests.crash.crashes import (
    ROOT,
    Run,
    Scenario,
    assert_explained,
    record,
    saved_image,
)
from tests.crash.recorder import merge
from tests.crash.replay import Model, write_image
from tests.crash.world import Plain, Saved, arrays_at, plain_at, scratch
from tests.launch import run_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crash.recorder import Op
    from tests.crash.replay import Image

RECORD_WRITERS = str(Path(__file__).parent / "programs" / "record_writers.py")
WRITERS_WAYS = [
    f"{writers} {way}"
    for writers in ("root", "node", "all")
    for way in ("blocking", "asynchronous")
] + ["all overlapped"]
"""Directories in which the program saves in these ways."""

TILES_WAYS = ["root blocking", "root asynchronous", "all blocking", "all overlapped"]
"""The same for state that is cut over the ranks, which all ranks write in any way."""


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
        with run.start(io=IO(mode="direct"), keep=2) as training:
            training.restore()
            run.save(training, 2)
            run.save(training, 3, only=["arrays"])

    scenario = record(Scenario("direct", base, saves=saves, acked=0), program)
    assert {"extend", "cut"} <= {op.kind for op in scenario.ops}
    return scenario


def saves_behind_the_training(*, overlap: bool = False) -> Scenario:
    base, saves = saved_image([1])
    name = "overlapped" if overlap else "asynchronous"

    def program(run: Run) -> None:
        with run.start(keep=1, asynchronous=True, overlap=overlap) as training:
            training.restore()
            run.save(training, 2)
            number, pending = run.start_save(training, 3)
            later, last = run.start_save(training, 4)  # waits for the one before
            assert pending.finished
            run.recorder.mark(number)
            training.move(99)  # what is staged does not change any more
            last.wait()
            run.recorder.mark(later)

    return record(Scenario(name, base, saves=saves, acked=0), program)


def saves_of_plain_states() -> Scenario:
    """Nothing but streams of bytes: no state shows its tensors."""
    base, saves = saved_image([1])

    def program(run: Run) -> None:
        with run.start(keep=2) as training:
            training.restore()
            for step in (2, 3, 4):
                run.save(training, step, only=["plain"])

    scenario = record(Scenario("plain states", base, saves=saves, acked=0), program)
    assert {op.path.rpartition("/")[2] for op in scenario.ops if op.kind == "create"} == {
        "plain.bin",
        "manifest.json",
    }
    return scenario


def saves_through_adaptdl() -> Scenario:
    """The drop-in for adaptdl.checkpoint: one state loaded and saved, or all of them."""
    base, saves = saved_image([1])

    def program(run: Run) -> None:
        arrays, plain = ArrayState("arrays", arrays_at(0)), Plain()

        def save(step: int, saved: Saved, save: Callable[[], Any]) -> None:
            run.scenario.saves.append(saved)
            for name, array in arrays_at(step).items():
                arrays.arrays[name][:] = array
            plain.value = plain_at(step)
            save()
            run.recorder.mark(len(run.scenario.saves) - 1)

        options = Options(retention=KeepLast(1), strict=False, preemption_signals=())
        checkpoint.configure(run.root, comm=MPI.COMM_SELF, options=options)
        try:
            for state in (arrays, plain):
                checkpoint.register(state)
                assert checkpoint.load_state(state)
            # The surface counts no steps: it stays at the step that was loaded.
            save(2, Saved(1, 2, 2), checkpoint.save_all_states)
            save(3, Saved(1, 2, 3), lambda: checkpoint.save_state(plain, run.root))
            save(4, Saved(1, 4, 4), checkpoint.save_all_states)
        finally:
            checkpoint.close()

    return record(Scenario("adaptdl", base, saves=saves, acked=0), program)


@functools.cache
def recorded_on_all_ranks(ranks: int, *, cut: bool = False) -> dict[str, list[Op]]:
    """Return what jobs of so many ranks do, in every way that a save can be written."""
    sandbox = scratch()
    base, _ = saved_image([1], cut=cut)
    try:
        out = sandbox / "records"
        ways = TILES_WAYS if cut else WRITERS_WAYS
        for way in ways:
            (sandbox / way).mkdir()
            write_image(base, sandbox / way)
        command = [RECORD_WRITERS, str(sandbox), str(out), "cut" if cut else "whole"]
        outcome = run_job(ranks, [*command, *ways], timeout=100)
        assert outcome.code == 0, outcome.text
        recorded = {
            way: merge(records) for way, records in json.loads(out.read_text()).items()
        }
        for way, ops in recorded.items():
            assert_explained(Scenario(way, base, ops), sandbox / way)
        return recorded
    finally:
        shutil.rmtree(sandbox)


def saves_of_writers(ranks: int, way: str, *, cut: bool = False) -> Scenario:
    """Recorded on every rank, in one order, with one writer or with several."""
    base, saves = saved_image([1], cut=cut)
    saves += [Saved.of(2), Saved(3, 2, 3), Saved.of(4)]
    ops = recorded_on_all_ranks(ranks, cut=cut)[way]
    name = f"{ranks} ranks, {way}{', tiles' if cut else ''}"
    return Scenario(name, base, ops, saves=saves, acked=0, cut=cut)


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
        cut=scenario.cut,
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
