# SPDX-License-Identifier: Apache-2.0
"""Draws the history of a directory with matplotlib: steps, metrics, saves over time."""

from __future__ import annotations

import io
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from mpi_ckpt.cli.command import MISUSED, CommandError
from mpi_ckpt.cli.plain_text import clean

if TYPE_CHECKING:
    from mpi_ckpt.cli.observe.record import RunRecord
    from mpi_ckpt.storage.journal import HistoryEvent

_METRICS_MAX = 4
_PHASES = ("sync", "stage", "write", "publish")
_MARKERS = {
    "saved": ("o", "save"),
    "kept": (".", "save on the hosts"),
    "copied": ("^", "copy from the hosts"),
    "failed": ("1", "failed save on the hosts"),
    "restored": ("v", "restore"),
    "fresh": ("*", "fresh start"),
    "stopped": ("s", "stop on request"),
    "ended": ("x", "end"),
}
_COLOURS = {"restored": "tab:orange", "fresh": "tab:green", "stopped": "tab:purple"}


def draw(record: RunRecord, file_format: str) -> bytes:
    """Return a picture of a history.

    Args:
        record: At least one event.
        file_format: ``png``, ``svg`` or ``pdf``.

    Raises:
        CommandError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError(
            "drawing needs matplotlib: pip install 'mpi_ckpt[plot]'",
            code=MISUSED,
            kind="missing",
        ) from error
    metrics = record.metric_names[:_METRICS_MAX]
    # Not by pyplot, which would look for a display.
    figure = Figure(figsize=(9, 2.2 * (2 + len(metrics))), layout="constrained")
    panels: Any = figure.subplots(2 + len(metrics), sharex=True, squeeze=False)
    _draw_steps(panels[0][0], record)
    for (panel,), name in zip(panels[1:-1], metrics, strict=True):
        _draw_metric(panel, record, name)
    _draw_durations(panels[-1][0], record)
    stream = io.BytesIO()
    figure.savefig(stream, format=file_format, dpi=120)
    return stream.getvalue()


def _draw_steps(panel: Any, record: RunRecord) -> None:  # noqa: ANN401 (matplotlib)
    seen = set()
    sizes = sorted({event.ranks for event in record.events if event.ranks})
    for number, job in enumerate(record.jobs):
        ranks = max((event.ranks for event in job), default=0)
        shade = 0.06 + 0.12 * (sizes.index(ranks) if ranks in sizes else 0)
        span = _when(job[0]), _when(job[-1])
        panel.axvspan(*span, color="tab:blue", alpha=min(shade, 0.5), lw=0)
        text = f"{ranks}" if number < 30 else ""
        panel.text(
            *(span[0], 1.0, text),
            transform=panel.get_xaxis_transform(),
            fontsize=7,
            va="bottom",
            ha="left",
        )
        # A copy comes when the training is at a later step already.
        placed = [
            event for event in job if _kind(event) not in ("fresh", "ended", "copied")
        ]
        line = [_when(event) for event in placed], [event.step for event in placed]
        panel.plot(*line, color="tab:blue", lw=1)
        for event in job:
            kind = _kind(event)
            marker, name = _MARKERS[kind]
            panel.plot(
                *([_when(event)], [event.step]),
                marker=marker,
                ms=4 if kind == "saved" else 7,
                color=_COLOURS.get(kind, "tab:blue"),
                ls="",
                label=None if kind in seen else name,
            )
            seen.add(kind)
    panel.set_ylabel("step")
    panel.set_title("steps; above: number of ranks", fontsize=9, loc="right")
    if seen:
        panel.legend(fontsize=7, ncols=len(seen), loc="upper left")


def _draw_metric(panel: Any, record: RunRecord, name: str) -> None:  # noqa: ANN401
    for job in record.jobs:
        saves = [event for event in job if name in event.metrics]
        values = [event.metrics[name] for event in saves]
        panel.plot([_when(event) for event in saves], values, ".-", color="tab:red", lw=1)
    # A name from a file must not be read as a formula.
    panel.set_ylabel(clean(name).replace("$", r"\$")[:24])


def _draw_durations(panel: Any, record: RunRecord) -> None:  # noqa: ANN401
    saves = [event for event in record.saves if event.seconds]
    times = [_when(event) for event in saves]
    below = [0.0] * len(saves)
    for phase in _PHASES:
        spent = [event.seconds.get(phase, 0.0) for event in saves]
        if any(spent):
            top = [low + more for low, more in zip(below, spent, strict=True)]
            panel.vlines(times, below, top, lw=3, label=phase, color=_colour(phase))
            below = top
    panel.set_ylabel("seconds a save")
    panel.set_ylim(0, 1.25 * max(below, default=0.0) or 1.0)  # room for the legend
    panel.tick_params(axis="x", labelsize=7, rotation=20)
    if any(below):
        panel.legend(fontsize=7, ncols=4, loc="upper left")


def _kind(event: HistoryEvent) -> str:
    return "copied" if event.copied_from else event.event


def _colour(phase: str) -> str:
    return f"C{_PHASES.index(phase)}"


def _when(event: HistoryEvent) -> datetime:
    return datetime.fromtimestamp(min(max(event.time, 0.0), 4e9), timezone.utc)
