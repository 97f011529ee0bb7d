# SPDX-License-Identifier: Apache-2.0
"""A program that ends while hosts still copy: it ends at once, and leaves nothing half."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.launch import environment
from tests.waiting import limit

PROGRAM = """
import sys
import numpy as np
from mpi_ckpt import ArrayState, CheckpointManager, Local, Options

place, how = sys.argv[1:]
local = Local(place + "/host", reserve=0, drain=1.0)
states = [ArrayState("a", {f"x{n}": np.ones(1000) for n in range(9)})]
options = Options(interval=1, preemption_signals=())
manager = CheckpointManager(place + "/run", states, options=options, local=local)
manager.step()
assert manager._session.hosts.drain.is_copying
if how == "raises":
    with manager:
        raise SystemExit(3)
print("left", flush=True)
"""


@pytest.mark.parametrize(("how", "code"), [("ends", 0), ("raises", 3)])
def test_a_copy_does_not_keep_a_program_from_its_end(tmp_path, how, code):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), how],
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=limit(60),
    )
    assert done.returncode == code, done.stderr
    # By its rate the copy takes 20 hours.
    assert time.monotonic() - start < limit(30)
    run = tmp_path / "run"
    assert not list(run.glob("checkpoint-*"))
    assert list(run.glob(".partial-*"))
