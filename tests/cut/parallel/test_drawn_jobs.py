# SPDX-License-Identifier: Apache-2.0
"""Whole round trips, drawn: any arrays, cut in any way, in any memory, on any ranks."""

from itertools import count, product

import numpy as np
import pytest

from mpi_ckpt import ArrayState, ConcatState, ShardedArrayState
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.decomposition.rank_plan import Outgoing
from mpi_ckpt.engine.restore.cut.trading import _Trader
from mpi_ckpt.options import IO
from tests.cut import drawn
from tests.cutting import CutArray, write_cut
from tests.examples import on_every_rank
from tests.ranks import manager, on_first


class Side:
    """The state of one rank in one of the programs of a job.

    Args:
        job: The job.
        program: The program.
        rank: The rank.
        filled: Whether it has the values; otherwise a restore is to bring them.
    """

    def __init__(self, job, program, rank, *, filled):
        self.wholes = {name: one.array() for name, one in job.arrays.items()}
        self.parts, self.expected = [], self.wholes
        if program.kind == "cut":
            self.state = ShardedArrayState("s", self._blocks(program, rank, filled=filled))
            return
        if program.kind == "rows":
            mine = slice(*program.rows[rank : rank + 2])
            if not filled:
                # A restore gives each rank as many as the next, whoever saved them.
                rows, size = program.rows[-1], program.size
                mine = slice(rows * rank // size, rows * (rank + 1) // size)
            self.expected = {name: whole[mine] for name, whole in self.wholes.items()}
        kind = ConcatState if program.kind == "rows" else ArrayState
        if filled:
            arrays = {name: one.copy() for name, one in self.expected.items()}
        elif program.kind == "rows":
            arrays = {name: np.zeros_like(one[:0]) for name, one in self.wholes.items()}
        else:
            arrays = {name: np.zeros_like(one) for name, one in self.wholes.items()}
        self.state = kind("s", arrays)

    def _blocks(self, program, rank, *, filled):
        blocks = {}
        for name, whole in self.wholes.items():
            made = [drawn.part(whole, *one) for one in program.boxes[name][rank]]
            for part in made:
                if filled:
                    part.fill(whole)
            self.parts += [(part, whole) for part in made]
            blocks[name] = [part.block for part in made]
        return blocks

    def problems(self):
        """Return what is wrong after a restore."""
        if isinstance(self.state, ShardedArrayState):
            found = [part.problem(whole) for part, whole in self.parts]
            return [problem for problem in found if problem]
        return [
            f"{name}: {self.state.arrays[name]!r}, not {array!r}"
            for name, array in self.expected.items()
            if self.state.arrays[name].dtype != array.dtype
            or self.state.arrays[name].shape != array.shape
            or self.state.arrays[name].tobytes() != array.tobytes()
        ]


def save(comm, root, job):
    """Save by the first ranks."""

    def work(part):
        side = Side(job, job.saved, part.rank, filled=True)
        with manager(root, side.state, comm=part, **job.writing) as ours:
            ours.save(step=1).wait()

    on_first(comm, job.saved.size, work)


def restore(comm, root, job):
    """Restore by the first ranks; require that each has what was saved."""

    def work(part):
        side = Side(job, job.wanted, part.rank, filled=False)
        with manager(root, side.state, comm=part, **job.reading) as ours:
            ours.restore()
        return side.problems()

    assert not on_first(comm, job.wanted.size, work)


def round_trips(comm, shared_path):
    """Return what checks one job."""
    numbers = count()

    def round_trip(job):
        root = shared_path / str(next(numbers))
        save(comm, root, job)
        restore(comm, root, job)

    return round_trip


def sizes(comm):
    """Return the ranks of a program that saves and of one that restores: all pairs."""
    return product(range(1, comm.size + 1), repeat=2)


@pytest.mark.parametrize("wanted", drawn.KINDS)
@pytest.mark.parametrize("saved", drawn.KINDS)
def test_any_job_restores_what_any_other_saved(comm, shared_path, saved, wanted):
    examples = 6 if saved == wanted == "cut" else 2
    round_trip = round_trips(comm, shared_path)
    for pair in sizes(comm):
        jobs = drawn.jobs((saved, wanted), pair)
        on_every_rank(comm, jobs, round_trip, count=examples)


@pytest.mark.parametrize("wanted", drawn.KINDS)
def test_tiles_of_several_blocks_are_restored(comm, shared_path, wanted):
    """A digest block is 16 MiB: here a few bytes, so that tiles have many of them."""
    numbers = count()

    def small_blocks(job):
        root = shared_path / str(next(numbers))
        if comm.rank == 0:
            boxes = job.saved.boxes
            saved = {
                name: CutArray(stored_array(one.array()), stored_boxes(boxes[name]))
                for name, one in job.arrays.items()
            }
            write_cut(root, saved, state="s", block_bytes=job.block_bytes)
        comm.Barrier()
        restore(comm, root, job)

    for pair in sizes(comm):
        on_every_rank(comm, drawn.jobs(("cut", wanted), pair), small_blocks, count=2)


def stored_array(array):
    """Return an array with the byte order of a file."""
    return array.astype(array.dtype.newbyteorder("<"))


def stored_boxes(dealt):
    """Return the boxes that a file has: none is empty, and of replicas there is one."""
    seen = set()
    return [
        [
            Box(*box)
            for *box, _ in boxes
            if 0 not in box[1] and not (tuple(box) in seen or seen.add(tuple(box)))
        ]
        for boxes in dealt
    ]


def test_a_rank_that_mixes_up_what_it_sends_is_found(peers, shared_path, monkeypatch):
    """The jobs drawn are such that a fault of one rank shows, and a small one is told."""
    real = _Trader._elements

    def mixed_up(self, table, row):
        found = real(self, table, row)
        return np.flip(found) if isinstance(table, Outgoing) else found

    if peers.rank == peers.size - 1:
        monkeypatch.setattr(_Trader, "_elements", mixed_up)
    jobs = drawn.jobs(("cut", "cut"), (peers.size, peers.size))
    with pytest.raises(AssertionError, match=r"other elements(.|\n)*Job\(arrays="):
        on_every_rank(
            peers, jobs, round_trips(peers, shared_path), count=40, shrink_seconds=1
        )


@pytest.mark.parametrize(
    ("dtype", "shape"), [(">f8", ()), (">f8", (8,)), (">U3", (5,)), (">c16", (2, 16))]
)
def test_blocks_that_end_within_elements_of_another_byte_order(
    comm, shared_path, dtype, shape
):
    """No live bytes are those of the file: each element is put together first."""
    whole = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    everything = [Box.whole(shape)]
    if comm.rank == 0:
        array = whole.astype(whole.dtype.newbyteorder("<"))
        saved = {"x": CutArray(array, [everything])}
        write_cut(shared_path, saved, state="s", block_bytes=3)
    comm.Barrier()
    state = ArrayState("s", {"x": np.zeros(shape, dtype)})
    with manager(shared_path, state, comm=comm, io=IO(window_bytes=1)) as ours:
        ours.restore()
    assert state.arrays["x"].tobytes() == whole.tobytes()
