# SPDX-License-Identifier: Apache-2.0
"""Four ranks that all fail say so in 40 lines, all of them together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.jobs import PROGRAMS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs import Jobs

LINES_MAX = 40

# What Open MPI's and MPICH's launchers say by themselves of a job that ends with an error.
_LAUNCHERS = (
    r"-{20,}\n(?:(?!-{20,}).*\n)*?-{20,}\n",
    r"=== *\n(?:=.*\n)*?=+\n(?:.*\n)*?(?==|\Z)",
    r"\[warn\] Epoll .*\n",
    r"^(Abort|application called).*\n",
    r"^YOUR APPLICATION TERMINATED.*\n",
)

ALWAYS = [
    ("constructor", "alike", "RegistrationError"),
    ("mismatch", "different", "StateMismatchError"),
    ("diverged", "different", "DivergedError"),
]
LONG = [
    ("stream", "alike", "StageError"),
    ("options", "different", "OptionsError"),
    ("constructor", "different", "RegistrationError"),
    ("other_names", "alike", "RegistrationError"),
    ("other_names", "different", "RegistrationError"),
    ("options", "alike", "OptionsError"),
    ("stream", "different", "StageError"),
    ("capture", "alike", "StageError"),
    ("capture", "different", "StageError"),
    ("mismatch", "alike", "StateMismatchError"),
    ("missing", "alike", "StateMismatchError"),
    ("diverged", "alike", "DivergedError"),
    ("diverged_states", "alike", "DivergedError"),
    ("two_wishes", "alike", "OptionsError"),
    ("two_wishes", "different", "CollectiveError"),
    ("name_taken", "alike", "RegistrationError"),
    ("other_calls", "alike", "CollectiveError"),
    ("other_calls", "different", "CollectiveError"),
    ("late", "alike", "CollectiveError"),
]


def own_lines(text: str) -> list[str]:
    """Return what the ranks have said, without the launcher's own lines."""
    for pattern in _LAUNCHERS:
        text = re.sub(pattern, "", text, flags=re.MULTILINE)
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("how", "way", "kind"),
    [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)],
)
def test_ranks_that_all_fail(
    jobs: Jobs, tmp_path: Path, how: str, way: str, kind: str
) -> None:
    outcome = jobs.run(4, PROGRAMS / "failing_alike.py", tmp_path / "root", how, way)
    assert outcome.code not in (0, 124), outcome.text
    lines = own_lines(outcome.err)
    assert len(lines) <= LINES_MAX, outcome.text
    assert max(map(len, lines)) < 5000
    # The one that tells it says where in the program; all others name it.
    told = "\n".join(lines)
    assert len(re.findall(rf"^mpi_ckpt\.errors\.{kind}: ", told, re.MULTILINE)) >= 1, told
    assert 'failing_alike.py", line' in told
    assert len(re.findall(rf"^rank \d of 4 on \S+: {kind}", told, re.MULTILINE)) >= 2, told
    if how == "mismatch":
        assert "more: `problems` of the error has them" in told
    if how == "diverged":
        assert "and 988 more differ between ranks" in told
