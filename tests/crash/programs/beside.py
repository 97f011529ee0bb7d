# SPDX-License-Identifier: Apache-2.0
"""One of several programs that use a checkpoint directory at the same time.

``beside save DIRECTORY NUMBER``: saves and prunes as fast as it can, at least so many
times, until a file ``stop`` is there. ``beside restore DIRECTORY NUMBER``: restores so
many times without the lock, on all ranks. ``beside look DIRECTORY NUMBER``: looks so many
times, by the command line. Each notes what came of it in a file of its name.
"""

import itertools
import json
import sys
import traceback
from pathlib import Path

from click.testing import CliRunner
from mpi4py import MPI

from mpi_ckpt.cli.app import cli
from mpi_ckpt.errors import CheckpointError
from mpi_ckpt.options import IO
from tests.crash.faults import quiet
from tests.crash.world import Saved, Training

role, directory, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
FOUND = 5
root, comm = directory / "ckpt", MPI.COMM_WORLD


def save():
    """Keep one generation: what a reader has found is gone a moment later."""
    with Training(root, keep=1, comm=comm) as training:
        step, stop = 0, False
        while not stop:
            step += 1
            training.save(step)
            if comm.rank == 0 and step == 1:
                (directory / "started").touch()
            stop = comm.bcast(step >= number and (directory / "stop").exists())
    return {"saves": step}


def restore():
    found, failed = set(), []
    reading = {"read_only": True, "io": IO(readers="all")}
    with Training(root, comm=comm, **reading) as training:
        loads = 0
        # The same on all ranks; on a slow disk there is little new to find in that time.
        while loads < number or (len(found) <= FOUND and loads < 200 * number):
            loads += 1
            training.move(0)
            try:
                saved = training.restore()
            except (CheckpointError, ValueError) as error:
                failed.append(f"{type(error).__name__}: {error}")
            else:
                found.add(saved.step)
                if saved != Saved.of(saved.step):
                    failed.append(f"a mixture: {saved}")
        if training.manager.restore().quarantined:
            failed.append("generations were called bad")
    return {"loads": loads, "failed": failed, "generations": len(found)}


def look():
    failed = []
    commands = (["ls"], ["show"], ["verify"], ["verify", "--all"], ["show", "--structure"])
    for arguments in itertools.islice(itertools.cycle(commands), number):
        told = CliRunner().invoke(cli, [arguments[0], str(root), *arguments[1:]])
        if told.exit_code:
            trace = "".join(traceback.format_exception(told.exception))
            failed.append(f"{arguments}: {told.exit_code} {told.output} {trace}")
    return {"loads": number, "failed": failed}


with quiet():
    told = {"save": save, "restore": restore, "look": look}[role]()
if comm.rank == 0:
    (directory / role).write_text(json.dumps(told))
