# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of documents."""

import logging

import pytest


@pytest.fixture
def own_logging():
    """Undo what a page sets for the process: levels, and handlers of the root logger."""
    root, ours = logging.getLogger(), logging.getLogger("mpi_ckpt")
    before = root.level, list(root.handlers), ours.level
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    ours.setLevel(before[2])
