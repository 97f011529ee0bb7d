# SPDX-License-Identifier: Apache-2.0
"""Kills a training twice, resumes it with other numbers of ranks, and proves the outcome.

``scripts/demo`` calls this with the right Python. Takes about half a minute; everything
it makes is under ``--out``. The exit code is 0 only if all that is claimed was seen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import Job, mpi_name
from loss_curve import Run, draw, read_runs
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

EPOCHS = 12
STEPS = EPOCHS * 24
SAVE_EVERY = 20
# The digits' model is saved in a few milliseconds. With this much more, a save takes long
# enough to be caught in the middle, as that of a large model would.
BALLAST_MIB = 24
PATIENCE_SECONDS = 120


class Training:
    """A directory with the checkpoints and the log of one training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.checkpoints = folder / "checkpoints"

    @property
    def runs(self) -> list[Run]:
        """What was logged, run by run."""
        return read_runs(self.folder / "log.jsonl")

    def start(self, ranks: int) -> Job:
        """Start the training, or go on with it: the command is the same."""
        command = [
            *(str(Path(__file__).with_name("train.py")), "--epochs", str(EPOCHS)),
            *("--checkpoints", str(self.checkpoints), "--interval", str(SAVE_EVERY)),
            *("--log", str(self.folder / "log.jsonl"), "--ballast", str(BALLAST_MIB)),
        ]
        return Job(ranks, command, self.folder / "output.txt")

    def finish(self, ranks: int) -> Run:
        """Run to the end."""
        code = self.start(ranks).wait(PATIENCE_SECONDS)
        if code != 0:
            self._fail(f"the training ended with code {code}")
        return self.runs[-1]

    def wait_for_step(self, job: Job, step: int) -> None:
        """Return when a job has come that far."""
        self._wait(job, lambda: self._step() >= step, pause_seconds=0.01)

    def kill_in_mid_save(self, job: Job) -> Path:
        """Kill a job while it writes a checkpoint; return what it leaves unfinished."""
        while True:
            self._wait(job, lambda: self._unfinished() is not None)
            # Between seeing it and killing it the save may end. So stop first, look
            # again, and let go if it was too late: then the next save it is.
            job.stop()
            unfinished = self._unfinished()
            if unfinished is not None:
                job.kill()
                return unfinished
            job.resume()

    def _unfinished(self) -> Path | None:
        # A generation on its way out has such a name as well, but is no longer the newest.
        newest = max(map(_number, self.checkpoints.glob("checkpoint-*")), default=0)
        found = self.checkpoints.glob(".partial-*/*.safetensors")
        return next((path for path in found if _number(path.parent) > newest), None)

    def _step(self) -> int:
        return max((run.last_step for run in self.runs), default=0)

    def _wait(
        self, job: Job, condition: Callable[[], bool], pause_seconds: float = 0.001
    ) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if not job.is_running or time.monotonic() > deadline:
                job.kill()
                self._fail("the training ended, or hung, before it could be killed")
            time.sleep(pause_seconds)

    def _fail(self, what: str) -> None:
        output = self.folder / "output.txt"
        raise SystemExit(f"{what}; {output} ends with:\n{output.read_text()[-3000:]}")


def _number(folder: Path) -> int:
    """Return which generation a folder has, is to have, or had."""
    return int(folder.name.split("-")[1])


@dataclass
class Story:
    """Tells what happens, and keeps count of what was claimed and seen."""

    console: Console
    failed: int = 0

    def say(self, text: str) -> None:
        """Tell one thing."""
        self.console.print(f"  {text}", highlight=False)

    def check(self, holds: bool, claim: str) -> None:
        """Say whether a claim was seen to hold."""
        self.failed += not holds
        mark = "[green]✓[/green]" if holds else "[bold red]✗ NOT TRUE:[/bold red]"
        self.console.print(f"    {mark} {claim}", highlight=False)


def survive(story: Story, training: Training) -> None:
    """Four ranks, killed; two ranks, told to stop; three ranks, to the end."""
    console = story.console
    story.say("[bold]4 ranks[/bold] start from nothing")
    with console.status("training with 4 ranks"):
        job = training.start(4)
        training.wait_for_step(job, 90)
        unfinished = training.kill_in_mid_save(job)
    written = unfinished.stat().st_size / 1e6
    step = training.runs[0].last_step
    number = _number(unfinished.parent)
    published = training.checkpoints / f"checkpoint-{number:08d}"
    story.say(f"[red]SIGKILL[/red] to all processes after step {step}, in mid-save")
    story.check(
        not published.exists(),
        f"{written:.0f} MB of generation {number} are there, it was never published",
    )

    story.say("[bold]2 ranks[/bold] go on, by the same command")
    with console.status("training with 2 ranks"):
        job = training.start(2)
        training.wait_for_step(job, 165)
        told_at = training.runs[1].last_step
        os.kill(job.ranks()[1], signal.SIGTERM)
        code = job.wait(PATIENCE_SECONDS)
    killed, told = training.runs
    story.check(
        told.generation == number - 1 and told.first_step == step - step % SAVE_EVERY,
        f"from generation {told.generation}, step {told.first_step}: the newest whole one",
    )
    story.check(not unfinished.exists(), "what the kill had left was swept away")
    story.say(f"[yellow]SIGTERM[/yellow] to rank 1 alone, at about step {told_at}")
    story.check(
        told.stopped_with == code == 143,
        f"rank 0 heard of it: saved at step {told.last_step}, all left with code 143",
    )

    story.say("[bold]3 ranks[/bold] finish")
    with console.status("training with 3 ranks"):
        last = training.finish(3)
    story.check(
        last.first_step == told.last_step,
        f"from generation {last.generation}, step {last.first_step}: no step lost",
    )
    seen = {e["epoch"]: e["samples"] for run in (killed, told, last) for e in run.epochs}
    story.check(
        seen == dict.fromkeys(range(EPOCHS), 1500),
        f"each of {EPOCHS} epochs summed up its 1500 samples, over ranks and restarts",
    )
    accuracy = last.epochs[-1]["accuracy"]
    story.check(
        last.last_step == STEPS and accuracy > 0.95,
        f"after {STEPS} steps {accuracy:.1%} of the digits unseen so far are read right",
    )


def compare(story: Story, left_alone: Training, killed: Training) -> None:
    """Two ranks, uninterrupted, against two ranks killed in mid-save and resumed."""
    with story.console.status("training with 2 ranks, uninterrupted"):
        expected = left_alone.finish(2)
    story.say(f"[bold]2 ranks[/bold], left alone:         weights {expected.digest[:16]}")
    with story.console.status("training with 2 ranks, to be killed"):
        job = killed.start(2)
        killed.wait_for_step(job, 145)
        killed.kill_in_mid_save(job)
    with story.console.status("training with 2 ranks, resumed"):
        resumed = killed.finish(2)
    step, epoch_steps = resumed.first_step, STEPS // EPOCHS
    story.say(f"[bold]2 ranks[/bold], killed and resumed: weights {resumed.digest[:16]}")
    story.check(
        step % epoch_steps != 0,
        f"resumed at step {step}: batch {step % epoch_steps} of {epoch_steps} in its epoch",
    )
    story.check(
        resumed.digest == expected.digest,
        "the same weights, bit for bit, as if it had never been killed",
    )


def summarise(console: Console, runs: list[Run], ends: list[str]) -> None:
    """Show the runs of the interrupted training side by side."""
    table = Table("ranks", "went on from", "steps", "ended by", box=box.SIMPLE_HEAD)
    for run, end in zip(runs, ends, strict=True):
        origin = "nothing" if run.generation is None else f"generation {run.generation}"
        steps = f"{run.first_step} to {run.last_step}"
        table.add_row(str(run.ranks), origin, steps, end)
    console.print(table)


def main() -> int:
    """Tell the story; return 0 if all of it came true."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    out = parser.parse_args().out.absolute()
    console = Console(soft_wrap=True)
    story = Story(console)
    began = time.monotonic()

    console.print(
        Panel.fit(
            f"mpi_ckpt on {mpi_name()}: a training is cut off twice, and finishes",
            border_style="blue",
        )
    )
    console.print("[bold]1. Killed, resumed with other ranks[/bold]")
    training = Training(out / "survivor")
    survive(story, training)
    ends = ["SIGKILL in the middle of a save", "SIGTERM to one rank", "the last epoch"]
    summarise(console, training.runs, ends)
    curve = out / "loss.png"
    draw(training.runs, ends[:-1], curve)

    console.print("[bold]2. Killed or not: the same weights[/bold]")
    compare(story, Training(out / "left-alone"), Training(out / "killed"))

    seconds = time.monotonic() - began
    verdict = f"[bold red]{story.failed} claims did not hold[/bold red]"
    if not story.failed:
        verdict = "[bold green]All of it was seen to hold.[/bold green]"
    console.print(Panel.fit(f"{verdict} It took {seconds:.0f} s."))
    console.print(f"The loss curve is in {os.path.relpath(curve)}", highlight=False)
    return 1 if story.failed else 0


if __name__ == "__main__":
    sys.exit(main())
