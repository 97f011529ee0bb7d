# SPDX-License-Identifier: Apache-2.0
"""Runs a command of ``mpi-ckpt`` in a pseudo-terminal, and gives what it has written."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import mpi_ckpt
from tests.waiting import limit

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
REPOSITORY = Path(mpi_ckpt.__file__).parents[1]


def shown_in_terminal(
    words: list[str], columns: int, folder: Path | None = None
) -> tuple[int, str]:
    """Return the exit code, and standard output as the terminal got it."""
    ours, theirs = pty.openpty()
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm",
        "COLUMNS": str(columns),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "mpi_ckpt", *words],
        env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd=folder,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while data := os.read(ours, 1 << 16):
            written += data
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    code = process.wait(timeout=limit(60))
    return code, written.decode(errors="surrogateescape").replace("\r\n", "\n")


def plain(written: str) -> str:
    """Return what a terminal was given, without colours."""
    return COLOURS.sub("", written)
