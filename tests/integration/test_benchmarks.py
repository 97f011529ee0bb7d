# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, so that none rots."""

import json

import pytest

from benchmarks.cases import CASES
from tests.launch import run_job


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_case_runs(ranks, tmp_path):
    lines = tmp_path / "figures.jsonl"
    job = run_job(
        ranks,
        ["-m", "benchmarks", "--smoke", "--json", str(lines), "--directory", str(tmp_path)],
        timeout=60,
    )
    assert job.code == 0, job.text
    figures = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {figure["case"] for figure in figures} == set(CASES)
    for case in CASES:
        assert any(figure["ceiling"] for figure in figures if figure["case"] == case)
    assert all(figure["ranks"] == ranks and figure["median"] > 0 for figure in figures)
