# SPDX-License-Identifier: Apache-2.0
"""A state of each kind in one job, all of one step: cut over the ranks, whole, random."""

import numpy as np

from mpi_ckpt import (
    ArrayState,
    ConcatState,
    ElasticSampler,
    ObjectState,
    RNGState,
    ShardedArrayState,
)
from tests.crash.world import Arrays
from tests.cut import cuts

SHAPE = (8, 6)
ROWS = 11


class Mixture:
    """The states of one rank, and what they hold at a step.

    Args:
        comm: The communicator of the job.
        cut: How the field is cut, from `tests.cut.cuts`.
        overlap: Whether an asynchronous save copies the whole arrays late.
    """

    def __init__(self, comm, cut=cuts.rows, *, overlap=False):
        self.rank, self.size = comm.rank, comm.size
        self.boxes = cut(SHAPE, comm.size)[comm.rank]
        blocks = cuts.blocks(self.field_at(0), self.boxes)
        self.field = ShardedArrayState("field", {"x": blocks})
        self.rows = ConcatState("rows", self.rows_at(0))
        arrays = {name: np.zeros(1000) for name in "uvw"}
        self.whole = (
            Arrays("whole", arrays, overlap=True)
            if overlap
            else ArrayState("whole", arrays)
        )
        self.object = ObjectState("object", {"step": 0})
        self.generator = np.random.default_rng(0)
        self.random = RNGState(generators={"own": self.generator})
        self.sampler = ElasticSampler(240, 16, seed=5)
        self.states = [
            *(self.field, self.rows, self.whole),
            *(self.object, self.random, self.sampler),
        ]

    def field_at(self, step):
        return np.random.default_rng(step).random(SHAPE)

    def rows_at(self, step):
        """Return this rank's rows: as many as an even share of all has."""
        rows = np.arange(ROWS * self.rank // self.size, ROWS * (self.rank + 1) // self.size)
        return {"number": rows, "at": np.stack([rows + step, rows - step], 1) / 2}

    def move(self, step):
        """Bring all states to a step."""
        if isinstance(self.whole, Arrays):
            self.whole.wait()
        for block, (offset, length) in zip(self.field.blocks["x"], self.boxes, strict=True):
            block.array[...] = self.field_at(step)[cuts.box_slices(offset, length)]
        self.rows.arrays = self.rows_at(step)
        for array in self.whole.arrays.values():
            array[:] = step
        self.object.value = {"step": step}
        self.generator.bit_generator.state = self.stream_at(step).bit_generator.state
        self.sampler.set_epoch(step)

    def stream_at(self, step):
        return np.random.default_rng([step + 1000, self.rank])

    def problems(self, step, *, same_size=True):
        """Return the names of the states that hold something else than at a step."""
        rows = self.rows_at(step)
        own, there = self.generator.bit_generator.state, self.stream_at(step)
        blocks = zip(self.field.blocks["x"], self.boxes, strict=True)
        found = {
            "field": all(
                block.array.tobytes()
                == self.field_at(step)[cuts.box_slices(offset, length)].tobytes()
                for block, (offset, length) in blocks
            ),
            "rows": all(
                self.rows.arrays[name].tobytes() == column.tobytes()
                for name, column in rows.items()
            ),
            "whole": all((array == step).all() for array in self.whole.arrays.values()),
            "object": self.object.value == {"step": step},
            # A rank beyond the saved ones has a stream of its own.
            "random": not same_size or own == there.bit_generator.state,
            "sampler": self.sampler.epoch == step,
        }
        return [name for name, is_right in found.items() if not is_right]
