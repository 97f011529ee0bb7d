# SPDX-License-Identifier: Apache-2.0
"""Whole round trips, drawn: any arrays, cut in any way, in any memory, on any ranks.

What ranks must have alike comes from a stream that all draw; layouts from a stream of each.
"""

import numpy as np
import pytest

from mpi_ckpt import ArrayState, ConcatState, ShardedArrayState
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.options import IO
from tests.cut import drawn
from tests.cutting import CutArray, write_cut
from tests.draws import SEED, STRESS, TIMES
from tests.ranks import manager, on_first, randoms

DRAWS = 200 if STRESS else 14 * TIMES
KINDS = ("whole", "cut", "rows")


class Job:
    """Some arrays of a job, drawn; and the ways in which two programs have them.

    Args:
        random: A random stream that is the same on every rank.
        most: Ranks at most.
    """

    def __init__(self, random, most):
        self.kinds = random.choice(KINDS), random.choice(KINDS)
        rows = random.randint(0, 6) if "rows" in self.kinds else None
        names = [f"a{n}" for n in range(random.randint(1, 4))]
        self.wholes = {name: drawn.array(random, rows=rows) for name in names}
        self.sizes = random.randint(1, most), random.randint(1, most)
        self.parts = [
            {n: drawn.parts(random, w.shape, size) for n, w in self.wholes.items()}
            for size in self.sizes
        ]
        # Where the rows of a rank end; a rank may have none.
        ends = sorted(random.randint(0, rows or 0) for _ in range(self.sizes[0] - 1))
        self.rows = [0, *ends, rows or 0]

    def saved(self, rank, own):
        """Return the state that a rank saves."""
        kind, parts = self.kinds[0], self.parts[0]
        if kind == "whole":
            return ArrayState("s", {n: w.copy() for n, w in self.wholes.items()})
        if kind == "rows":
            mine = slice(self.rows[rank], self.rows[rank + 1])
            return ConcatState("s", {n: w[mine].copy() for n, w in self.wholes.items()})
        blocks = {}
        for name, whole in self.wholes.items():
            made = [drawn.part(own, whole, box, ghosts=True) for box in parts[name][rank]]
            for part in made:
                part.fill(whole)
            blocks[name] = [part.block for part in made]
        return ShardedArrayState("s", blocks)

    def wanted(self, rank, own):
        """Return the state that a rank restores, and what then finds its problems."""
        kind, size = self.kinds[1], self.sizes[1]
        if kind == "whole":
            state = ArrayState("s", {n: np.zeros_like(w) for n, w in self.wholes.items()})
            return state, lambda: self.differing(state.arrays, self.wholes)
        if kind == "rows":
            rows = self.rows[-1]
            share = slice(rows * rank // size, rows * (rank + 1) // size)
            empty = {n: np.zeros_like(w[:0]) for n, w in self.wholes.items()}
            state = ConcatState("s", empty)
            own_rows = {n: w[share] for n, w in self.wholes.items()}
            return state, lambda: self.differing(state.arrays, own_rows)
        made = {
            name: [
                drawn.part(own, whole, box, ghosts=True)
                for box in self.parts[1][name][rank]
            ]
            for name, whole in self.wholes.items()
        }
        blocks = {name: [part.block for part in of_leaf] for name, of_leaf in made.items()}

        def problems():
            found = [
                part.problem(self.wholes[name])
                for name, of_leaf in made.items()
                for part in of_leaf
            ]
            return [problem for problem in found if problem]

        return ShardedArrayState("s", blocks), problems

    @staticmethod
    def differing(arrays, expected):
        return [
            name
            for name, array in expected.items()
            if arrays[name].dtype != array.dtype
            or arrays[name].shape != array.shape
            or arrays[name].tobytes() != array.tobytes()
        ]


def options_of(random):
    """Draw how bytes move; the same on every rank."""
    return {
        "writers": random.choice(["root", "all"]),
        "asynchronous": random.random() < 0.4,
        "io": IO(
            window_bytes=random.choice([1, 64, 4096, 1 << 20]),
            mode=random.choice(["auto", "direct", "buffered"]),
            readers=random.choice(["root", "node", "all"]),
        ),
    }


def restored(comm, root, job, own, options):
    """Restore by the first ranks; return what is wrong on any."""

    def restore(part):
        state, problems = job.wanted(part.rank, own)
        with manager(root, state, comm=part, **options) as ours:
            ours.restore()
        return problems()

    found = on_first(comm, job.sizes[1], restore)
    return [problem for of_rank in comm.allgather(found) for problem in of_rank or ()]


@pytest.mark.parametrize("seed", range(DRAWS))
def test_any_job_restores_what_any_other_saved(comm, shared_path, seed):
    random, own = randoms(f"{SEED} {seed}"), randoms(f"{SEED} {seed} {comm.rank}")
    job, options = Job(random, comm.size), options_of(random)

    def save(part):
        with manager(shared_path, job.saved(part.rank, own), comm=part, **options) as ours:
            ours.save(step=1).wait()

    on_first(comm, job.sizes[0], save)
    wrong = restored(comm, shared_path, job, own, options)
    assert wrong == [], (job.kinds, job.sizes, job.wholes)


@pytest.mark.parametrize("seed", range(DRAWS // 2))
def test_tiles_of_several_blocks_are_restored(comm, shared_path, seed):
    """A digest block is 16 MiB: here a few bytes, so that tiles have many of them."""
    random, own = randoms(f"{SEED} b{seed}"), randoms(f"{SEED} b{seed} {comm.rank}")
    job, options = Job(random, comm.size), options_of(random)
    saved = {
        name: CutArray(whole.astype(whole.dtype.newbyteorder("<")), stored(parts))
        for (name, whole), parts in zip(
            job.wholes.items(), job.parts[0].values(), strict=True
        )
    }
    block_bytes = random.choice([1, 3, 8, 64])
    if comm.rank == 0:
        write_cut(shared_path, saved, state="s", block_bytes=block_bytes)
    comm.Barrier()
    wrong = restored(comm, shared_path, job, own, options)
    assert wrong == [], (job.kinds, job.sizes, job.wholes)


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


def stored(dealt):
    """Return the boxes that a file has: none is empty, and of replicas there is one."""
    seen = set()
    return [
        [
            Box(*box)
            for box in boxes
            if 0 not in box[1] and not (box in seen or seen.add(box))
        ]
        for boxes in dealt
    ]
