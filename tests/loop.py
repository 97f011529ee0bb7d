# SPDX-License-Identifier: Apache-2.0
"""``mpi-ckpt run`` as a process of a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from typing import TYPE_CHECKING

from tests.launch import end_tree, environment
from tests.waiting import limit, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PATIENCE_SECONDS = 120


def write_script(path: Path, text: str) -> Path:
    """Write lines of bash as a program; return its path."""
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


class Loop:
    """``mpi-ckpt run`` with a program in a folder."""

    def __init__(self, folder: Path, *words: object) -> None:
        self.folder = folder
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        command = [sys.executable, "-m", "mpi_ckpt", "run", "--json", "--folder", folder]
        with (folder / "err").open("a") as err:
            self.process = subprocess.Popen(
                [str(word) for word in [*command, *words]],
                env=environment({"PATH": path}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
            )

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            end_tree(self.process.pid)
        self.process.communicate()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when a condition holds; fail if the loop ends, or hangs, before."""
        wait_for(lambda: condition() or self.process.poll() is not None, PATIENCE_SECONDS)
        assert condition(), self.told()

    def finish(self) -> dict:
        out, _ = self.process.communicate(timeout=limit(PATIENCE_SECONDS))
        assert out, self.told()
        return json.loads(out)

    def told(self) -> str:
        return (self.folder / "err").read_text()

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []
