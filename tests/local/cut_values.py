# SPDX-License-Identifier: Apache-2.0
"""A training with state that is cut over its ranks, whose values follow from the step."""

from __future__ import annotations

import numpy as np

from mpi_ckpt import Block, ConcatState, ShardedArrayState
from tests.local.scene import Values

ROWS, COLUMNS, PARTICLES = 13, 6, 11


def field_at(step):
    return np.arange(ROWS * COLUMNS, dtype=np.float64).reshape(ROWS, COLUMNS) + 1000 * step


class CutValues(Values):
    """The states of `Values`, a field, a table that ranks share, and particles."""

    def __init__(self, comm):
        super().__init__(comm)
        self.first = ROWS * comm.rank // comm.size
        self.last = ROWS * (comm.rank + 1) // comm.size
        # Ghost cells around it: the interior is not contiguous.
        self.field = np.zeros((self.last - self.first + 2, COLUMNS + 2))
        self.table = np.zeros(5, np.float32)
        self.blocks = ShardedArrayState(
            "field",
            {
                "rho": Block(
                    self.field,
                    shape=(ROWS, COLUMNS),
                    offset=(self.first, 0),
                    ghosts=1,
                ),
                "table": Block(self.table, shape=(5,), offset=(0,)),
            },
        )
        self.particles = ConcatState("particles", {"ids": np.zeros(0, np.int32)})
        self.states += [self.blocks, self.particles]

    def go_to(self, step):
        super().go_to(step)
        self.field[1:-1, 1:-1] = field_at(step)[self.first : self.last]
        self.table[:] = step
        share = np.array_split(np.arange(PARTICLES, dtype=np.int32), self.comm.size)
        # The last rank has most of them in each second step: then their forms change.
        mine = share[self.comm.rank] if step % 2 else share[-1 - self.comm.rank]
        self.particles.arrays = {"ids": mine + 100 * step}

    def check(self, step, ranks):
        super().check(step, ranks)
        expected = field_at(step)[self.first : self.last]
        np.testing.assert_array_equal(self.field[1:-1, 1:-1], expected)
        assert (self.table == step).all()
        every = self.comm.allgather(self.particles.arrays["ids"])
        assert sorted(np.concatenate(every) - 100 * step) == list(range(PARTICLES))
