# SPDX-License-Identifier: Apache-2.0
"""Starts again on both hosts in each state that a crash may leave, one of them damaged.

Arguments: file with the states, file for what is wrong. The damage is a flipped byte in one
file of the newest generation of a host, or the loss of its disk, or nothing.
"""

import json
import pickle
import random
import shutil
import sys
from pathlib import Path

from mpi4py import MPI

from tests.crash.crashes import ROOT, empty, quiet_scratch
from tests.crash.hosts import HOSTS, local_level
from tests.crash.replay import write_image
from tests.crash.world import Training, fault_of_restore, pretend_hosts

HARMS = ("nothing", "tiles", "share", "manifest", "disk")


def harm(sandbox: Path, rng: random.Random) -> str:
    """Damage what one host keeps; say what was done."""
    host, what = rng.choice(HOSTS), rng.choice(HARMS)
    disk = sandbox / "local" / host
    if what == "disk":
        shutil.rmtree(disk, ignore_errors=True)
    elif what != "nothing":
        # All of them: only the newest one counts.
        found = [
            path
            for path in disk.glob(f"*/checkpoint-*/{what}*")
            if path.parent == max(path.parent.parent.glob("checkpoint-*"))
        ]
        for path in found[:1]:
            data = bytearray(path.read_bytes())
            if data:  # a power cut may have left nothing of it
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
    return f"{what} of {host}"


def main() -> None:
    scenario, seed, states = pickle.loads(Path(sys.argv[1]).read_bytes())
    comm, rng, wrong = MPI.COMM_WORLD, random.Random(seed), []
    pretend_hosts(comm)
    with quiet_scratch() as own:
        sandbox = comm.bcast(own)
        for done, image in states:
            comm.Barrier()
            if comm.rank == 0:
                empty(sandbox)
                write_image(image, sandbox)
                harmed = harm(sandbox, rng)
            comm.Barrier()
            local = local_level(sandbox)
            acked = scenario.acked_after(done)
            with Training(
                sandbox / ROOT, comm=comm, local=local, cut=scenario.cut
            ) as training:
                fault = fault_of_restore(training, scenario.saves, acked)
            faults = [one for one in comm.gather(fault) or () if one is not None]
            if faults:
                wrong.append(f"{faults[0]}, {harmed}, after operation {done}")
        comm.Barrier()
    if comm.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(wrong))


if __name__ == "__main__":
    main()
