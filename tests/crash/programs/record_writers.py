# SPDX-License-Identifier: Apache-2.0
"""Records on every rank what saves do, in every way that they can be written.

Two ranks at most share a host, or so they say. Arguments: sandbox (a directory with the
base for each way), file for the records, "cut" if there is state that is cut over the
ranks, the ways.
"""

import json
import sys
from pathlib import Path

from mpi4py import MPI

from tests.crash.crashes import ROOT, Run, Scenario
from tests.crash.recorder import Recorder, in_place_of_os, to_json
from tests.crash.world import Saved, Training, pretend_hosts

WAYS: dict[str, dict[str, bool]] = {
    "blocking": {},
    "asynchronous": {"asynchronous": True},
    "overlapped": {"asynchronous": True, "overlap": True},
}


def record(
    sandbox: Path, writers: str, way: str, comm, *, cut: bool
) -> tuple[list[int], str]:
    """Save in one way; return times and operations of this rank."""
    recorder = Recorder(sandbox)
    run = Run(Scenario(writers, saves=[Saved.of(1)]), sandbox, recorder)
    options = {"writers": writers, "comm": comm, "cut": cut, **WAYS[way]}
    with in_place_of_os(recorder), Training(sandbox / ROOT, keep=1, **options) as training:
        assert training.restore() == Saved.of(1)
        run.save(training, 2)
        run.save(training, 3, moved=["plain"])
        run.save(training, 4)
    return recorder.times, to_json(recorder.ops)


def main() -> None:
    sandbox, out, cut = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "cut"
    comm = MPI.COMM_WORLD
    per_host = pretend_hosts(comm)
    records = {}
    for name in sys.argv[4:]:
        writers, way = name.split()
        mine = record(sandbox / name, writers, way, comm, cut=cut)
        records[name] = comm.gather(mine)
        if comm.rank == 0:
            ranks = {
                number for number, (_, text) in enumerate(records[name]) if "pwrite" in text
            }
            few = {"root": {0}, "node": set(range(0, comm.size, per_host))}
            expected = None if cut else few.get(writers)
            assert ranks == (expected or set(range(comm.size))), (name, ranks)
    if comm.rank == 0:
        out.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
