# SPDX-License-Identifier: Apache-2.0
"""Programs that serve a file system of a test through FUSE, for as long as it takes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.launch import REPOSITORY
from tests.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


class NotHereError(Exception):
    """What this machine lacks, so that a test is skipped."""


@contextlib.contextmanager
def served(
    path: Path,
    module: str,
    arguments: Sequence[object],
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Run a program that mounts a file system, until the end of the block.

    Args:
        path: Where it mounts it.
        module: The program.
        arguments: Of the program.
        environment: Variables of it, besides those of this process.

    Raises:
        NotHereError: If FUSE is not allowed.
    """
    program = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait_for(path, program)
        yield program
    finally:
        # Without a look whether it is mounted: if the program is dead, none can be had.
        unmount = ["umount", "--lazy", str(path)]
        subprocess.run(unmount, check=False, capture_output=True)
        # It would end when it is unmounted, but not while another mount namespace, made
        # meanwhile, has a copy of the mount.
        program.kill()
        program.communicate()


def _wait_for(path: Path, program: subprocess.Popen[str]) -> None:
    def is_decided() -> bool:
        return os.path.ismount(path) or program.poll() is not None

    if not wait_for(is_decided, 90):
        raise TimeoutError("the FUSE program does not mount its disk")
    if program.poll() is not None:
        assert program.stderr is not None
        said = program.stderr.read()
        if said.startswith("fuse"):  # libfuse, or its fusermount
            raise NotHereError(f"FUSE is not allowed here: {said}")
        raise RuntimeError(said)
