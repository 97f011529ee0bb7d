# SPDX-License-Identifier: Apache-2.0
"""Saves with every rank under strace, and with the seam recorded as well.

Arguments: sandbox (holds the base), directory for the records, who writes, "asynchronous"
or "blocking". In that directory: ``log.RANK`` by strace, ``seam.RANK`` by the recorder.
MPI_CKPT_TEST_BEHIND: something is done behind the seam.
"""

import contextlib
import os
import sys
from pathlib import Path

from tests.crash.strace_log import COMMAND, MARK

sandbox, records, writers, way = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]

if "MPI_CKPT_TEST_TRACED" not in os.environ:
    # Each launcher says the rank before MPI starts.
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
    os.environ["MPI_CKPT_TEST_TRACED"] = "1"
    log = str(records / f"log.{rank}")
    os.execvp("strace", [*COMMAND, "-o", log, sys.executable, *sys.argv])

from mpi4py import MPI  # noqa: E402

from tests.crash.crashes import ROOT, Run, Scenario  # noqa: E402
from tests.crash.recorder import Recorder, in_place_of_os, to_json  # noqa: E402
from tests.crash.world import Saved, Training  # noqa: E402


class Marking(Recorder):
    """A recorder whose marks strace sees too."""

    def mark(self, note: int) -> None:
        super().mark(note)
        with contextlib.suppress(NotADirectoryError):
            os.open(f"{MARK}{note}", os.O_RDONLY)


comm = MPI.COMM_WORLD
recorder = Marking(sandbox)
run = Run(Scenario("traced", saves=[Saved.of(1)]), sandbox, recorder)
options = {"writers": writers, "asynchronous": way == "asynchronous", "comm": comm}
with in_place_of_os(recorder), Training(sandbox / ROOT, keep=1, **options) as training:
    assert training.restore() == Saved.of(1)
    if "MPI_CKPT_TEST_BEHIND" in os.environ:
        (sandbox / "behind").mkdir()
    run.save(training, 2)
    run.save(training, 3, moved=["plain"])
    run.save(training, 4)
(records / f"seam.{comm.rank}").write_text(to_json(recorder.ops))
