# SPDX-License-Identifier: Apache-2.0
"""Draws a timeline of `MPI_CKPT_TIMELINE` without a browser: a bar for each event.

python examples/timeline_picture.py timeline.json timeline.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = {
    "sync": "#4c78a8", "stage": "#72b7b2", "write": "#54a24b", "publish": "#e45756",
    "match": "#9d755d", "transfer": "#54a24b", "adopt": "#b279a2",
    "exchange": "#eeca3b", "wait": "#bab0ac",
}  # fmt: skip
LANES = {"operation": 0, "phase": 1, "exchange": 2, "wait": 2}


def draw(events: list[dict[str, Any]]) -> Figure:
    """Return a picture with three lanes for each track: operation, phase, communication."""
    spans = [event for event in events if event["ph"] == "X"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    start = min(event["ts"] for event in spans)
    tracks = sorted({(event["pid"], event["tid"]) for event in spans})
    figure = Figure(figsize=(11, 0.5 + 1.1 * len(tracks)), layout="constrained")
    axes = figure.subplots()
    for event in spans:
        track = tracks.index((event["pid"], event["tid"]))
        kind = event["name"] if event["cat"] == "phase" else event["cat"]
        place = (event["ts"] - start) / 1e3, max(event["dur"] / 1e3, 0.05)
        height = 4 * track + LANES[event["cat"]]
        axes.broken_barh([place], (height, 0.9), color=COLOURS.get(kind, "#d8dee9"))
        if event["cat"] == "operation":
            axes.text(place[0], height + 0.72, event["name"], fontsize=7, va="center")
    axes.set_yticks([4 * n + 1.4 for n in range(len(tracks))])
    threads = ("", ", background")
    axes.set_yticklabels([f"{names[pid]}{threads[tid]}" for pid, tid in tracks])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    used = {event["name"] for event in spans} | {event["cat"] for event in spans}
    handles = [Patch(color=c, label=name) for name, c in COLOURS.items() if name in used]
    axes.legend(handles=handles, fontsize=8, ncols=len(handles), loc="upper right")
    return figure


if __name__ == "__main__":
    source, target = sys.argv[1:]
    draw(json.loads(Path(source).read_text())).savefig(target, dpi=110)
