# SPDX-License-Identifier: Apache-2.0
"""What a person is told of a restore of cut state: its bytes, as of any other."""

import numpy as np
import pytest

from mpi_ckpt import ArrayState, Block, ConcatState, PerRankState, ShardedArrayState
from mpi_ckpt.options import IO
from mpi_ckpt.reports import Progress
from tests.ranks import manager, on_first

LENGTH = 40_000


def clocks_of(job):
    """Note the clock of each save and restore of a manager, with its seconds."""
    found, observer = [], job._session.observer
    pause = observer.pause

    def note(clock):
        found.append(clock)
        pause(clock)

    observer.pause = note
    return found


def bounds(size):
    return [LENGTH * rank // size for rank in range(size + 1)]


def states(comm):
    """Return states of two kinds of cuts, one that is whole, and one of each rank."""
    rows = np.zeros(np.diff(bounds(comm.size))[comm.rank])
    return {
        "field": ShardedArrayState("field", {"x": Block.rows(rows, comm)}),
        "rows": ConcatState("rows", {"y": rows.copy()}),
        "whole": ArrayState("whole", {"z": np.zeros(LENGTH)}),
        "own": PerRankState("own", b"." * LENGTH, resize=lambda parts, n: parts[:1] * n),
    }


def bytes_here(comm, kinds):
    """Return the bytes of the arrays of a rank."""
    rows = int(np.diff(bounds(comm.size))[comm.rank])
    lengths = {"field": rows, "rows": rows, "whole": LENGTH, "own": 0}
    return 8 * sum(lengths[kind] for kind in kinds)


@pytest.mark.parametrize("kinds", [["field"], ["rows"], ["field", "rows", "whole", "own"]])
def test_a_restore_counts_all_bytes_that_reach_a_rank(comm, shared_path, kinds):
    with manager(shared_path, *(states(comm)[k] for k in kinds), comm=comm) as job:
        job.save()

    def restore(part):
        mine = states(part)
        options = {"io": IO(window_bytes=1 << 16), "comm": part}
        with manager(shared_path, *(mine[k] for k in kinds), **options) as job:
            noted = clocks_of(job)
            report = job.restore()
            described = job._session.observer.describe_progress
            lines = [described("restoring", clock, 2.0) for clock in noted]
        (progress,) = [clock.progress for clock in noted]
        assert progress.moved == progress.expected
        assert progress.moved >= bytes_here(part, kinds)
        assert " MiB/s, 0 s left" in lines[0] or " KiB/s, 0 s left" in lines[0]
        assert report.bytes_read > 0
        return progress.moved

    for size in range(1, comm.size + 1):
        on_first(comm, size, restore)


def test_bytes_are_counted_as_they_come(comm, shared_path, monkeypatch):
    """In many turns: a person sees a rate, not one jump at the end."""
    counted, count = [], Progress.count

    def note(progress, nbytes):
        counted.append(nbytes)
        count(progress, nbytes)

    rows = np.zeros((6, np.diff(bounds(comm.size))[comm.rank]))
    blocks = {f"x{n}": Block.rows(one, comm) for n, one in enumerate(rows)}
    cut = ShardedArrayState("field", blocks)
    with manager(shared_path, cut, comm=comm, io=IO(window_bytes=1 << 16)) as job:
        job.save()
        monkeypatch.setattr(Progress, "count", note)
        job.restore()
    assert len([n for n in counted if n]) >= 6
    assert sum(counted) >= rows.nbytes


def test_a_save_counts_roots_tiles(comm, shared_path):
    cut = states(comm)["field"]
    with manager(shared_path, cut, comm=comm) as job:
        noted = clocks_of(job)
        job.save()
    if comm.rank == 0:
        progress = noted[0].progress
        # A file's header is expected as well.
        assert bytes_here(comm, ["field"]) <= progress.moved <= progress.expected
