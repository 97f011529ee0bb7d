# SPDX-License-Identifier: Apache-2.0
"""The demonstration, as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.jobs import EXAMPLES
from tests.launch import environment
from tests.waiting import limit

if TYPE_CHECKING:
    from pathlib import Path

ONE_LINE_EACH = ("4 ranks start", "SIGKILL", "SIGTERM", "3 ranks finish", "bit for bit")


@pytest.mark.long
def test_demo_shows_all_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", "--out", out],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=limit(600),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "✗" not in done.stdout
    assert done.stdout.count("✓") == 9
    for words in ONE_LINE_EACH:
        assert words in done.stdout
    assert "\x1b" not in done.stdout, "colours in a file"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
