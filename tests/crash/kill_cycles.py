# SPDX-License-Identifier: Apache-2.0
"""Kills a real training again and again; its weights end the same, bit for bit.

A training is started, killed at a random moment (while it starts, restores, trains or
saves; a rank, all ranks or mpirun) and started again until it is done. Then its weights,
velocities and losses are compared with those of a run that nobody disturbed, and the
next training begins. ``scripts/kills`` runs this as a program.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash import killing
from tests.draws import SEED
from tests.launch import run_job, start_job
from tests.waiting import wait_for

PROGRAM = str(Path(__file__).parent / "programs" / "training.py")

SECONDS_TO_START_MAX = 120
SECONDS_OF_TRAINING_MAX = 1.0


@dataclass
class Figures:
    """What happened.

    Attributes:
        kills: By whom they hit and what the job was doing.
        trainings: Number of trainings that came to their end, all with the same bits.
    """

    kills: Counter[str] = field(default_factory=Counter)
    trainings: int = 0

    @property
    def cycles(self) -> int:
        """Number of kills."""
        return self.kills.total()

    def __str__(self) -> str:
        rows = [f"  {number:6d}  {what}" for what, number in sorted(self.kills.items())]
        ends = f"{self.trainings} trainings ended with the weights of an undisturbed run"
        return "\n".join([f"{self.cycles} kills:", *rows, ends])


class Cycles:
    """Trainings of one number of ranks, killed and started again.

    Args:
        folder: An empty directory.
        env: For the jobs, from `killing.own_sessions`.
        ranks: Number of ranks of every run.
        epochs: Length of a training; an epoch is 15 steps.
        seed: Draws the victims and the moments, as far as time can be drawn.
        cut: Whether some of the state is cut over the ranks.
    """

    def __init__(
        self,
        folder: Path,
        env: dict[str, str],
        *,
        ranks: int,
        epochs: int,
        seed: int,
        cut: bool = False,
    ) -> None:
        self.figures = Figures()
        self._folder, self._env = folder, env
        self._ranks, self._epochs = ranks, epochs
        self._what = "cut" if cut else "whole"
        self._rng = random.Random(f"{seed} {ranks}")
        self._expected = self._finish(self._new_training())
        self._training = self._new_training()

    def kill_once(self) -> None:
        """Start or restart the training and kill it, or let it end and begin another."""
        while not self._kill():
            self._compare()
        killing.remove_shared_memory(self._training)

    def end(self) -> None:
        """Let the training go on to its end."""
        self._finish(self._training)
        self._compare()

    def _kill(self) -> bool:
        """Run the training; tell whether it was killed before its end."""
        started = self._training / "started"
        before = started.read_text() if started.exists() else ""

        def has_started() -> bool:
            now = started.read_text() if started.exists() else ""
            return job.poll() is not None or now != before

        job = start_job(self._ranks, self._command(self._training), env=self._env)
        everybody: list[int] = []
        whom, is_training = "", False
        try:
            if self._rng.random() < 0.25:
                time.sleep(self._rng.random() * SECONDS_OF_TRAINING_MAX)
            else:
                came = wait_for(has_started, SECONDS_TO_START_MAX)
                assert came, "the training does not start"
                time.sleep(self._rng.random() * SECONDS_OF_TRAINING_MAX)
            is_training = has_started()
            everybody, running = killing.everybody_of(job)
            if job.poll() is None:
                whom = killing.kill_some(job, self._rng, running)
                assert wait_for(lambda: not killing.alive(everybody), 60), whom
        finally:
            outcome = killing.end_job(job, everybody)
        if whom:
            killing.forget_survivors(self._training)
        killing.fail_on_problem(self._training)
        if outcome.code == 0:
            return False
        assert whom, outcome.text
        self.figures.kills[f"{whom}, while it {'trains' if is_training else 'starts'}"] += 1
        return True

    def _finish(self, training: Path) -> str:
        outcome = run_job(self._ranks, self._command(training), timeout=300, env=self._env)
        killing.fail_on_problem(training)
        assert outcome.code == 0, outcome.text
        return (training / "digest").read_text()

    def _compare(self) -> None:
        """Require that the training ended as the undisturbed one; begin another."""
        learned = (self._training / "digest").read_text()
        assert learned == self._expected, f"{self._training}: other weights"
        self.figures.trainings += 1
        killing.remove_shared_memory(self._training)
        shutil.rmtree(self._training)
        self._training = self._new_training()

    def _new_training(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="training-", dir=self._folder))

    def _command(self, training: Path) -> list[str]:
        return [PROGRAM, str(training), str(self._epochs), self._what]


def main() -> None:
    """Kill as often as asked for; print the figures."""
    parser = argparse.ArgumentParser(prog="scripts/kills", description=__doc__)
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=40, help="length of a training")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--cut", action="store_true", help="cut some of the state over the ranks"
    )
    args = parser.parse_args()
    began = time.monotonic()
    folders = tempfile.TemporaryDirectory(prefix="mpi_ckpt-kills-")
    with folders as folder, killing.own_sessions() as env:
        cycles = Cycles(
            *(Path(folder), env),
            ranks=args.ranks,
            epochs=args.epochs,
            seed=args.seed,
            cut=args.cut,
        )
        for number in range(1, args.cycles + 1):
            cycles.kill_once()
            if number % 10 == 0 and sys.stderr.isatty():
                print(f"\r{number} of {args.cycles}", end="", file=sys.stderr)
        cycles.end()
    print(f"seed {args.seed}, {args.ranks} ranks, {time.monotonic() - began:.0f} s")
    print(cycles.figures)


if __name__ == "__main__":
    main()
