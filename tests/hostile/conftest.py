# SPDX-License-Identifier: Apache-2.0
"""Imports what a command needs before a bad input is measured."""

from __future__ import annotations

import pytest

from tests.commands import run
from tests.hostile.world import make_root


@pytest.fixture(scope="session", autouse=True)
def imported(tmp_path_factory) -> None:
    """Run a command on a good directory: its imports take 15 MiB, once in a process."""
    root = make_root(tmp_path_factory.mktemp("imported") / "root")
    for command in (("ls", root), ("show", root, "2", "--structure")):
        assert run(*command).exit_code == 0
