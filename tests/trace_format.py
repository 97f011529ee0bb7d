# SPDX-License-Identifier: Apache-2.0
"""The rules of Chrome's trace event format, as far as timelines use it: the array form."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

CLOCK_MICROSECONDS = 1.0  # a double of the time of day in microseconds has steps of 0.25

Event = dict[str, Any]


def problems_of(events: list[Event]) -> list[str]:
    """Return what a reader of the format would refuse, drop or draw in a wrong place."""
    found = [text for event in events for text in _problems_of_one(event)]
    if found:
        return found
    names = [(e["name"], e["pid"], e["tid"]) for e in events if e["ph"] == "M"]
    found += [f"named twice: {name}" for name, n in Counter(names).items() if n > 1]
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    for pid, tid in tracks:
        if ("thread_name", pid, tid) not in names:
            found.append(f"thread {tid} of process {pid} has no name")
        if not any(name == "process_name" and pid == of for name, of, _ in names):
            found.append(f"process {pid} has no name")
        found += _not_nested(tracks[pid, tid])
    return found


def _problems_of_one(event: Event) -> list[str]:
    kind = event.get("ph")
    wanted = {"X": {"cat", "ts", "dur", "tid"}, "M": {"tid", "args"}, "C": {"ts", "args"}}
    if kind not in wanted:
        return [f"of no known kind: {event}"]
    missing = ({"name", "ph", "pid"} | wanted[kind]) - event.keys()
    if missing:
        return [f"without {sorted(missing)}: {event}"]
    found = []
    if not (isinstance(event["name"], str) and event["name"]):
        found.append(f"without a name: {event}")
    if not all(type(event.get(key, 0)) is int for key in ("pid", "tid")):
        found.append(f"process or thread is no number: {event}")
    times = [event[key] for key in ("ts", "dur") if key in event]
    if not all(isinstance(t, int | float) and math.isfinite(t) and t >= 0 for t in times):
        found.append(f"at no time: {event}")
    if kind == "M" and event["name"] not in ("process_name", "thread_name"):
        found.append(f"says nothing: {event}")
    if kind == "M" and not isinstance(event["args"].get("name"), str):
        found.append(f"names nothing: {event}")
    if kind == "C" and not all(isinstance(v, int | float) for v in event["args"].values()):
        found.append(f"counts nothing: {event}")
    return found


def _not_nested(spans: list[Event]) -> list[str]:
    """Return the spans of a track that begin within another one and end behind it."""
    found, open_until = [], []
    for event in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        while open_until and open_until[-1] <= start + CLOCK_MICROSECONDS:
            open_until.pop()
        if open_until and end > open_until[-1] + CLOCK_MICROSECONDS:
            late = end - open_until[-1]
            found.append(f"ends {late:.1f} us behind what it is in: {event}")
        open_until.append(end)
    return found
