# SPDX-License-Identifier: Apache-2.0
"""The blocks of the documents that need a framework run as shown, on two ranks."""

from importlib.util import find_spec

import pytest

from tests.jobs import PROGRAMS

needs_lightning = pytest.mark.skipif(
    find_spec("lightning") is None, reason="PyTorch Lightning is not installed"
)


@pytest.mark.parametrize(
    "group",
    ["plain", "horovod", "torch", pytest.param("lightning", marks=needs_lightning)],
)
def test_blocks_run_on_two_ranks(jobs, tmp_path, group):
    pytest.importorskip("torch")
    outcome = jobs.run(2, PROGRAMS / "shown_blocks.py", tmp_path, group)
    assert outcome.code == 0, outcome.text
