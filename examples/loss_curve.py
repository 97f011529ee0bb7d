# SPDX-License-Identifier: Apache-2.0
"""Draws what train.py has logged: the loss, and with how many ranks it was brought down."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

__all__ = ["Run", "draw", "read_runs"]

Point = tuple[int, float]
"""Step and loss."""

_COLOURS = {1: "#8c6bb1", 2: "#e08214", 3: "#1b9e77", 4: "#2b6cb0"}
_SMOOTHING_STEPS = 12


@dataclass
class Run:
    """One launch of the job, as its log tells it."""

    ranks: int
    generation: int | None
    first_step: int
    steps: list[Point] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    stopped_with: int | None = None
    digest: str | None = None

    @property
    def last_step(self) -> int:
        """The last step it has taken."""
        return self.steps[-1][0] if self.steps else self.first_step


def read_runs(log: Path) -> list[Run]:
    """Return the runs in a log; a line that was cut off is left out."""
    runs: list[Run] = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "start":
            runs.append(Run(event["ranks"], event["generation"], event["step"]))
        elif event["event"] == "step":
            runs[-1].steps.append((event["step"], event["loss"]))
        elif event["event"] == "epoch":
            runs[-1].epochs.append(event)
        elif event["event"] == "stop":
            runs[-1].stopped_with = event["code"]
        elif event["event"] == "end":
            runs[-1].digest = event["digest"]
    return runs


def draw(runs: list[Run], why: list[str], path: Path) -> None:
    """Draw loss and accuracy over steps.

    Args:
        runs: In order.
        why: What ended each run but the last.
        path: Image file to write.
    """
    import matplotlib as mpl

    # On its first use on a machine it looks for fonts, and warns if that takes a while.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, accuracies) = plt.subplots(
        2, 1, sharex=True, figsize=(10, 6), height_ratios=(3, 1), layout="constrained"
    )
    # What a run did after the step at which the next one went on was done again.
    ends = [*(later.first_step for later in runs[1:]), runs[-1].last_step]
    kept = [
        point
        for run, end in zip(runs, ends, strict=True)
        for point in run.steps
        if point[0] <= end
    ]
    smooth = _smoothed(kept)
    for run, end in zip(runs, ends, strict=True):
        _draw_run(run, end, smooth, losses, accuracies)
    for (run, later), reason in zip(pairwise(runs), why, strict=True):
        _mark_restart(run, later, reason, losses, accuracies)
    losses.set(yscale="log", ylabel="loss of a global batch")
    losses.yaxis.set_major_formatter("{x:g}")
    accuracies.set(ylabel="accuracy", xlabel="training step")
    losses.set_title("One training, cut off twice, each time resumed with other ranks")
    for axes in (losses, accuracies):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_run(
    run: Run, end: int, smooth: list[Point], losses: Axes, accuracies: Axes
) -> None:
    colour = _COLOURS.get(run.ranks, "black")
    for axes in (losses, accuracies):
        axes.axvspan(run.first_step, end, color=colour, alpha=0.07, linewidth=0)
    losses.plot(*zip(*run.steps, strict=True), color=colour, alpha=0.3, linewidth=0.8)
    mine = [point for point in smooth if run.first_step <= point[0] <= end]
    losses.plot(*zip(*mine, strict=True), color=colour, linewidth=2.2)
    losses.annotate(
        f"{run.ranks} ranks",
        xy=((run.first_step + end) / 2, 0.97),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="top",
        color=colour,
        fontweight="bold",
    )
    points = [(e["step"], e["accuracy"]) for e in run.epochs if e["step"] <= end]
    if points:
        xs, ys = zip(*points, strict=True)
        accuracies.plot(xs, ys, "o", color=colour, markersize=5, clip_on=False)


def _mark_restart(
    run: Run, later: Run, reason: str, losses: Axes, accuracies: Axes
) -> None:
    for axes in (losses, accuracies):
        axes.axvline(later.first_step, color="0.3", linewidth=1, linestyle="--")
    redone = run.last_step - later.first_step
    if redone:
        colour = _COLOURS.get(run.ranks, "black")
        span = (later.first_step, run.last_step)
        losses.axvspan(*span, facecolor="none", edgecolor=colour, alpha=0.25, hatch="//")
    lost = f"{redone} steps done again (hatched)" if redone else "no step lost"
    losses.annotate(
        f"{reason}\n{lost}",
        xy=(later.first_step, 0.88),
        xytext=(6, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        fontsize=9,
        color="0.25",
        bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def _smoothed(steps: list[Point]) -> list[Point]:
    """Average each loss with those around it."""
    half = _SMOOTHING_STEPS // 2
    smooth = []
    for index, (step, _) in enumerate(steps):
        around = [loss for _, loss in steps[max(index - half, 0) : index + half + 1]]
        smooth.append((step, sum(around) / len(around)))
    return smooth
