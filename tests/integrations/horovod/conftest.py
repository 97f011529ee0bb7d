# SPDX-License-Identifier: Apache-2.0
"""Marks these tests, and skips them where there is no Horovod with MPI and torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = find_spec("horovod") is None
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.horovod)
        # Each job is ended, and its output told, before this.
        item.add_marker(pytest.mark.timeout(300))
        if missing:
            item.add_marker(pytest.mark.skip(reason="no Horovod: scripts/horovod_tests"))
