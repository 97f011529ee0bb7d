# SPDX-License-Identifier: Apache-2.0
"""Writes the golden generation of a format version. Run once per version, then committed::

    python -m tests.restore.make_golden v1

golden/v1 was written so by version 0.1.0 (CPython 3.11, NumPy 2.4, torch 2.13). It is not
written again: every later release must read those very bytes.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from mpi_ckpt import ArrayState, CheckpointManager, ModuleState, ObjectState, Options, State

GOLDEN = Path(__file__).parent / "golden"
STEP = 1234
METRICS = {"loss": 0.25, "worst": math.nan, "best": math.inf}
TEXT = b"what a plain state wrote\n" * 3


class Words(State):
    """A plain state with a name that is no file name."""

    data = TEXT

    def save(self, fileobj) -> None:
        fileobj.write(self.data)

    def load(self, fileobj) -> None:
        self.data = fileobj.read()


def arrays() -> dict[str, np.ndarray]:
    """Return arrays of every kind the format has a rule for."""
    return {
        "float64": np.array([[1.5, -0.0], [math.inf, 5e-324]]),
        "nan": np.array([0x7FC00001, 0xFFC12345], "<u4").view("<f4"),
        "int8": np.arange(-2, 3, dtype=np.int8),
        "bool": np.array([True, False]),
        "complex": np.array([1 + 2j, -3j], np.complex64),
        "dates": np.array(["1970-01-02", "NaT"], "M8[D]"),
        "words": np.array(["ä", "bc"]),
        "scalar": np.array(7, np.uint16),
        "empty": np.empty((0, 3), np.float32),
        "big endian": np.array([1, 256], ">i4"),
    }


def module() -> torch.nn.Module:
    """Return a module with tied bfloat16 parameters."""
    made = torch.nn.ParameterDict()
    made["weight"] = torch.arange(6).reshape(2, 3).to(torch.bfloat16)
    made["tied"] = made["weight"]
    return made


def value() -> dict:
    """Return an object with everything that JSON lacks."""
    return {
        "epoch": 3,
        "text": "ä/b",
        "pair": (1, 2.5),
        "keys": {1: "one", None: "none"},
        "inf": -math.inf,
        "complex": 1 + 2j,
        "bytes": b"\x00\xff",
        "seen": np.arange(3, dtype=np.int64),
    }


def states() -> list[State]:
    """Return the states of the golden generation, in order."""
    return [
        ArrayState("arrays", arrays()),
        ModuleState("model", module()),
        ObjectState("object", value()),
        Words("my/words"),
        Words(".hidden"),
    ]


if __name__ == "__main__":
    options = Options(preemption_signals=())
    root = GOLDEN / sys.argv[1]
    with CheckpointManager(root, states(), comm=MPI.COMM_SELF, options=options) as manager:
        manager.save(STEP, metrics=METRICS)
    (root / ".lock").unlink()
