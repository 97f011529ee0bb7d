# SPDX-License-Identifier: Apache-2.0
"""adaptdl's own test files, unchanged, on `mpi_ckpt.checkpoint`: scripts/adaptdl_tests.

As in adaptdl, each function begins on one rank, and what it returns is the number of ranks
of its next start.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.jobs import PROGRAMS, jobs_of_a_test

FUNCTIONS = [
    ("checkpoint_test.py", "test_duplicate", [1, 2]),
    ("checkpoint_test.py", "test_save_load", [1, 2]),
    ("torch/accumulator_test.py", "test_accumulator_restarts", [1, 4, 2]),
    ("torch/epoch_test.py", "test_epoch", [1, 5]),
]


def home():
    """Return the folder of adaptdl, None without it."""
    if given := os.environ.get("ADAPTDL_HOME"):
        return Path(given)
    spec = find_spec("adaptdl")
    return None if spec is None else Path(spec.origin).parent


pytestmark = pytest.mark.skipif(home() is None, reason="no adaptdl: scripts/adaptdl_tests")


@pytest.mark.parametrize(("file", "function", "starts"), FUNCTIONS)
def test_a_test_of_adaptdl_passes(tmp_path, file, function, starts):
    ranks, started = 1, []
    with jobs_of_a_test() as jobs:
        while ranks:
            result = tmp_path / f"result-{len(started)}"
            command = PROGRAMS / "adaptdl_file.py", home() / file, function, result
            outcome = jobs.run(
                ranks,
                *command,
                ADAPTDL_CHECKPOINT_PATH=str(tmp_path / "checkpoints"),
                ADAPTDL_NUM_RESTARTS=str(len(started)),
                ADAPTDL_NUM_REPLICAS=str(ranks),
            )
            assert outcome.code == 0, outcome.text
            started.append(ranks)
            ranks = json.loads(result.read_text())
    assert started == starts
