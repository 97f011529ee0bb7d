# SPDX-License-Identifier: Apache-2.0
"""Records on every rank what saves to hosts do, and a rescue: each rank is a host.

Arguments: sandbox, which is empty; file for the records; "blocking" or "asynchronous",
and "cut" if there is state that is cut over the ranks.
"""

import json
import sys
from pathlib import Path

from mpi4py import MPI

from mpi_ckpt.engine.hosts.copying.promoting import rescue
from mpi_ckpt.storage import filesystem
from tests.crash.crashes import ROOT, Run, Scenario
from tests.crash.hosts import Killed, ignoring_kills, local_level, place
from tests.crash.recorder import Recorder, in_place_of_os, to_json
from tests.crash.world import Saved, pretend_hosts


def main() -> None:
    sandbox, out, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    comm = MPI.COMM_WORLD
    pretend_hosts(comm)
    recorder = Recorder(sandbox)
    run = Run(Scenario("hosts", cut="cut" in way), sandbox, recorder)
    options = {"comm": comm, "keep": 2, "asynchronous": "asynchronous" in way}

    def start():
        return run.start(local=local_level(sandbox), **options)

    with in_place_of_os(recorder):
        # What both hosts need is noted before one goes on: each notes what it has done, and
        # the other, which finds it done, would else come first in the record.
        if comm.rank == 0:
            filesystem.make_directories(Path(place(sandbox)).parent)
        comm.Barrier()
        with ignoring_kills(), start() as training:
            assert training.restore() is None
            run.save(training, 1, level="local")
            run.save(training, 2, level="local")
            run.save(training, 3)
            run.save(training, 4, level="local")
            raise Killed
        comm.Barrier()
        with start() as training:
            assert training.restore() == Saved.of(4)
            run.save(training, 5, level="local")
            run.save(training, 6)  # after which the hosts' are removed at the end
        comm.Barrier()
        with ignoring_kills(), start() as training:
            assert training.restore() == Saved.of(6)
            run.save(training, 7, level="local")
            run.save(training, 8, level="local")
            raise Killed
        comm.Barrier()
        assert rescue(place(sandbox), sandbox / ROOT, comm).step == 8
    records = comm.gather((recorder.times, to_json(recorder.ops)))
    if comm.rank == 0:
        out.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
