# SPDX-License-Identifier: Apache-2.0
"""Runs a program and notes with what each rank leaves: note_exit.py FOLDER PROGRAM ...

With TEST_PACE in the environment each step takes so many seconds more, and those after step
TEST_HOLD a second, so that a test can end the program at a certain one.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from mpi_ckpt import CheckpointManager
from tests.uncompiled import leave_out_compiler

leave_out_compiler()
folder, program, *arguments = sys.argv[1:]
sys.argv = [program, *arguments]
sys.path[0] = str(Path(program).parent)
ending = "0"
step = CheckpointManager.step


def slow_step(manager, **values):
    held = manager.steps >= int(os.environ["TEST_HOLD"])
    time.sleep(1.0 if held else float(os.environ["TEST_PACE"]))
    return step(manager, **values)


if "TEST_PACE" in os.environ:
    CheckpointManager.step = slow_step
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as leaving:
    ending = str(leaving.code)
    raise
except BaseException as error:
    ending = f"{type(error).__name__}: {error}"
    raise
finally:
    from mpi4py import MPI

    (Path(folder) / f"exit-{MPI.COMM_WORLD.rank}").write_text(ending)
