# SPDX-License-Identifier: Apache-2.0
"""Runs a program and notes with what each rank leaves: note_exit.py FOLDER PROGRAM ..."""

import runpy
import sys
from pathlib import Path

folder, program, *arguments = sys.argv[1:]
sys.argv = [program, *arguments]
sys.path[0] = str(Path(program).parent)
ending = "0"
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
