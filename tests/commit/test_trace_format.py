# SPDX-License-Identifier: Apache-2.0
"""The check of timelines finds what is wrong with one."""

import pytest

from tests.trace_format import problems_of

NAMES = [
    {"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "rank 0"}},
    {"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "main"}},
]


def span(**changes):
    event = {"name": "sync", "cat": "phase", "ph": "X", "pid": 0, "tid": 0}
    return {**event, "ts": 100.0, "dur": 50.0, **changes}


def without(key):
    return {name: value for name, value in span().items() if name != key}


def test_a_good_timeline_has_no_problem():
    inner, after = span(ts=110.0, dur=20.0), span(ts=150.0, dur=5.0)
    count = {"name": "dropped", "ph": "C", "pid": 0, "ts": 200.0, "args": {"count": 0}}
    assert problems_of([*NAMES, inner, span(), after, count]) == []


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([*NAMES, span(ph="B")], "of no known kind"),
        ([*NAMES, without("dur")], "without ['dur']"),
        ([*NAMES, span(name="")], "without a name"),
        ([*NAMES, span(pid="0")], "is no number"),
        ([*NAMES, span(ts=float("nan"))], "at no time"),
        ([*NAMES, span(dur=-1.0)], "at no time"),
        ([*NAMES, span(tid=1)], "thread 1 of process 0 has no name"),
        ([*NAMES, span(pid=1)], "process 1 has no name"),
        ([*NAMES, NAMES[0], span()], "named twice"),
        ([*NAMES, span(), span(ts=140.0)], "ends 40.0 us behind"),
    ],
)
def test_what_is_wrong_is_found(events, said):
    problems = problems_of(events)
    assert any(said in problem for problem in problems), problems
