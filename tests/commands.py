# SPDX-License-Identifier: Apache-2.0
"""Runs commands of ``mpi-ckpt`` in this process, and makes directories for them."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from click.testing import CliRunner

from mpi_ckpt.cli.app import cli
from mpi_ckpt.options import Options
from mpi_ckpt.retention import KeepLast
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.states.nested import ObjectState
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from tests.making import Stream, save

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

COLUMNS = {"COLUMNS": "120"}


def run(*words: object) -> Result:
    """Run a command; anything but an exit is a failure of the test."""
    result = CliRunner().invoke(cli, [str(word) for word in words], env=COLUMNS)
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        raise error
    if error is not None and error.__cause__ is not None:
        raise error.__cause__  # what the command answered for as a fault of its own
    return result


def ask(*words: object, code: int = 0) -> dict[str, Any]:
    """Run a command with --json; return its answer."""
    result = run(*words, "--json")
    assert result.exit_code == code, result.output
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def fill(root: Path, count: int = 3) -> Path:
    """Save some generations: one state stays as it is, the others change."""
    arrays = {"grows": np.zeros(1000, np.float32), "none": np.empty((0, 4), np.int8)}
    frozen = ArrayState("frozen", {"table": np.arange(5000, dtype=np.float64)})
    options = Options(retention=KeepLast(100))
    directory = CheckpointDirectory(root)
    with closing(directory):
        directory.own()
        for number in range(1, count + 1):
            arrays["grows"][:number] += 1
            states = [
                frozen,
                ArrayState("arrays", arrays),
                ObjectState("progress", {"epoch": number, "seen": [1, 2]}),
                Stream("a/stream", b"x" * 100),
            ]
            noted = {"step": 100 * number, "size": 4, "metrics": {"loss": 1 / number}}
            save(directory, states, options=options, **noted)
    return root


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file, in this file alone: links of it keep theirs."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.unlink()
    path.write_bytes(data)
