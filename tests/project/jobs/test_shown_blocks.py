# SPDX-License-Identifier: Apache-2.0
"""The blocks of the documents that need a framework run as shown, on several ranks."""

from importlib.util import find_spec

import pytest

from tests.jobs import PROGRAMS

needs_lightning = pytest.mark.skipif(
    find_spec("lightning") is None, reason="PyTorch Lightning is not installed"
)


@pytest.mark.parametrize(
    "group",
    [
        *("recovery", "plain", "horovod", "torch"),
        pytest.param("lightning", marks=needs_lightning),
    ],
)
def test_blocks_run_as_shown(jobs, tmp_path, group):
    pytest.importorskip("torch")
    ranks = 3 if group == "recovery" else 2  # two that train, and their spare
    outcome = jobs.run(ranks, PROGRAMS / "shown_blocks.py", tmp_path, group)
    assert outcome.code == 0, outcome.text
