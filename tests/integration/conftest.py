# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that start whole jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.jobs import PATIENCE_SECONDS, Jobs, jobs_of_a_test

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    with jobs_of_a_test() as jobs:
        yield jobs


@pytest.fixture(scope="module")
def module_jobs() -> Iterator[Jobs]:
    with jobs_of_a_test() as jobs:
        yield jobs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each job of a test hang by itself, and be named, before pytest gives up."""
    for item in items:
        if item.path.parent == HERE and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(6 * PATIENCE_SECONDS))
