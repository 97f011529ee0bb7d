# SPDX-License-Identifier: Apache-2.0
"""``mpi-ckpt run`` around the real mpirun: killed again and again, it ends as if never.

With ``MPI_CKPT_TEST_STRESS`` set, twenty kills instead of three.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.draws import STRESS
from tests.jobs import PROGRAMS
from tests.launch import descendants
from tests.loop import Loop
from tests.programs.exact import train_alone

if STRESS:
    pytestmark = pytest.mark.timeout(1800)


class Watched(Loop):
    """The loop around programs/exact.py, which tells of each start and step."""

    def run_on(self, start: int, steps: int) -> None:
        """Return when the so-manieth start has done some steps."""
        self.wait_until(lambda: self._has_done(start, steps))

    def _has_done(self, start: int, steps: int) -> bool:
        starts, curve = self.lines("starts"), self.lines("curve.jsonl")
        if len(starts) < start or not curve or not curve[-1].endswith("}"):
            return False
        return json.loads(curve[-1])["step"] + 1 - int(starts[-1].split()[0]) >= steps

    def kill(self, which: str) -> None:
        """Kill one rank, all ranks, or the launcher, whose ranks are then left behind."""
        ours = descendants(self.process.pid)[:-1]
        names = {}
        for pid in ours:
            try:
                names[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
        ranks = [p for p, words in names.items() if str(PROGRAM).encode() in words[1:2]]
        # The launcher comes last: children are found before their parents.
        chosen = {"rank": ranks[:1], "ranks": ranks, "launcher": ours[-1:]}[which]
        assert chosen, names
        for pid in chosen:
            os.kill(pid, signal.SIGKILL)


PROGRAM = PROGRAMS / "exact.py"


def slots_in_turn(folder: Path) -> Path:
    """Return a hosts script that gives this machine another number of slots each time."""
    script = folder / "hosts"
    script.write_text(
        """#!/bin/bash
        n=$(cat "$0.asked" 2>/dev/null || echo 0); echo $((n + 1)) >"$0.asked"
        slots=(3 2 4 1); echo "localhost:${slots[n % 4]}"
        """
    )
    script.chmod(0o755)
    return script


@pytest.mark.long
def test_killed_again_and_again_it_ends_with_the_weights_of_a_run_that_was_not(tmp_path):
    kills = ["rank", "launcher", "ranks"]
    if STRESS:
        kills += random.Random(5).choices(kills, k=17)
    # Those at the end are for what it does until a busy machine has killed it.
    steps = 25 * (len(kills) + 1) + 500
    words = ["--np", 4, "--min-np", 1, "--max-restarts", 40, "--backoff", 0.1]
    words += ["--hosts-script", slots_in_turn(tmp_path)]
    with Watched(
        tmp_path, *words, "--", sys.executable, PROGRAM, tmp_path, steps, 0.03
    ) as loop:
        for start, which in enumerate(kills, 1):
            loop.run_on(start, 12)
            loop.kill(which)
        answer = loop.finish()
    assert answer["finished"], loop.told()
    attempts = answer["attempts"]
    assert [attempt["outcome"] for attempt in attempts[-1:]] == ["finished"]
    assert all(attempt["outcome"] in ("failed", "lost") for attempt in attempts[:-1])
    assert len(attempts) == len(kills) + 1
    assert [attempt["np"] for attempt in attempts[:4]] == [3, 2, 4, 1]
    # An attempt goes on where the one before had saved, and never before that.
    for before, after in pairwise(attempts):
        assert after["step_from"] >= before["step_to"]
    losses, weights = train_alone(steps)
    assert json.loads((tmp_path / "weights.json").read_text()) == weights
    curve = [json.loads(line) for line in loop.lines("curve.jsonl")]
    assert {event["step"] for event in curve} == set(range(steps))
    assert [event for event in curve if event["loss"] != losses[event["step"]]] == []


def test_signal_to_the_loop_saves_and_stops_and_it_goes_on_later(tmp_path):
    words = ["--np", 2, "--", sys.executable, PROGRAM, tmp_path, 40]
    with Watched(tmp_path, *words, 0.3) as loop:
        loop.run_on(1, 5)
        loop.process.send_signal(signal.SIGTERM)
        answer = loop.finish()
    assert loop.process.returncode == 143
    assert [attempt["outcome"] for attempt in answer["attempts"]] == ["preempted"]
    with Watched(tmp_path, *words, 0) as loop:
        answer = loop.finish()
    assert loop.process.returncode == 0
    assert answer["attempts"][0]["step_from"] >= 5
    assert json.loads((tmp_path / "weights.json").read_text()) == train_alone(40)[1]


FAILING = """
import sys
from mpi_ckpt import CheckpointManager, ObjectState, Options

counter = ObjectState("counter", 0)
with CheckpointManager(sys.argv[1], [counter], options=Options(interval=2)) as manager:
    manager.restore()
    while not manager.step():
        if manager.steps == 5 and sys.argv[2] == "raise":
            raise ValueError("this step is cursed")
        if manager.steps == 5:
            break
"""

ADAPTDL = """
import sys
from mpi_ckpt import checkpoint

class Count(checkpoint.State):
    def save(self, fileobj): fileobj.write(b"1")
    def load(self, fileobj): assert fileobj.read() == b"1"

checkpoint.configure(sys.argv[1])
checkpoint.load_state(Count("count"))
checkpoint.save_all_states()
if sys.argv[2] == "raise":
    raise ValueError("no")
"""


@pytest.mark.parametrize(
    ("program", "way", "outcomes", "error"),
    [
        (FAILING, "raise", ["failed"] * 3, "ValueError: this step is cursed"),
        (FAILING, "end", ["finished"], ""),
        (ADAPTDL, "end", ["finished"], ""),
        (ADAPTDL, "raise", ["failed"] * 3, "exit code 1"),
    ],
)
def test_program_tells_how_it_ends(tmp_path, program, way, outcomes, error):
    path = tmp_path / "program.py"
    path.write_text(program)
    words = ["--np", 2, "--backoff", 0, "--", sys.executable, "-m", "mpi4py", path]
    with Loop(tmp_path, *words, tmp_path / "run", way) as loop:
        answer = loop.finish()
    assert [attempt["outcome"] for attempt in answer["attempts"]] == outcomes, loop.told()
    assert answer["attempts"][-1]["error"] == error
    assert answer["finished"] == (outcomes == ["finished"])
