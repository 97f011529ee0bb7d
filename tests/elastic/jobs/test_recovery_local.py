# SPDX-License-Identifier: Apache-2.0
"""Hosts that keep saves and copy them to the directory are lost, and the job goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from mpi_ckpt.storage.reading.proving import verify
from mpi_ckpt.storage.reading.reader import GenerationReader
from tests.crash.rank_kills import FLAGS
from tests.elastic.jobs.test_recovery import long, survives
from tests.jobs import PROGRAMS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs import Jobs

PROGRAM = PROGRAMS / "recovering_local.py"
VALUE = 30 * 66.0

pytestmark = survives


@pytest.mark.parametrize(
    ("how", "spares", "sizes", "level"),
    [
        ("last memory", 0, [3, 2], "memory"),
        ("root disk", 0, [3, 2], "local"),
        ("last saving", 0, [3, 2], "local"),
        ("root disk", 1, [3, 3], "local"),
        pytest.param("root memory disk", 1, [3, 3], "memory", marks=long),
        pytest.param("last disk replace", 0, [3, 3], "local", marks=long),
    ],
)
def test_a_host_is_lost_while_hosts_copy_to_the_directory(
    jobs: Jobs,
    tmp_path: Path,
    how: str,
    spares: int,
    sizes: list[int],
    level: str,
) -> None:
    jobs.flags = FLAGS
    log = tmp_path / "log.jsonl"
    outcome = jobs.run(3 + spares, PROGRAM, tmp_path, log, how, spares)
    told = [json.loads(line) for line in log.read_text().splitlines()]
    starts, ends = told[:-1], told[-1]
    assert [start["size"] for start in starts] == sizes, outcome.text
    assert [start["level"] for start in starts] == [None, level], outcome.text
    # One that was lost between two renames leaves the next one whole, or none of it.
    steps = (16, 18) if "saving" in how else (16,)
    assert starts[-1]["step"] in steps, outcome.text
    # The copy of step 10 was cut off, and that of a later one finished by the last save.
    assert ends["copied"], outcome.text
    assert (ends["value"], ends["failures"], ends["partials"]) == (VALUE, 0, 0)
    saved = []
    for path in sorted((tmp_path / "run").glob("checkpoint-*")):
        with GenerationReader(path) as reader:
            verify(reader)
            saved.append(reader.manifest.step)
    assert saved[-1] == 30
    assert saved[:-1] in ([20], [26]), saved
    assert outcome.code in (0, 137), outcome.text
