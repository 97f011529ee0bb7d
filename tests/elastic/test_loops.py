# SPDX-License-Identifier: Apache-2.0
"""Loops over epochs and batches, cut off and resumed, tell what an undisturbed one does."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpi_ckpt import Accumulator, ElasticSampler, EpochState, remaining_epochs_until
from mpi_ckpt.comm import Communicator
from tests.making import carry


class CutOff(Exception):
    pass


@dataclass
class Program:
    """A training that sums wherever it may be done."""

    comm: object
    length: int
    batch: int
    every: int
    epochs: EpochState = field(default_factory=EpochState)
    told: dict = field(default_factory=dict)

    def __post_init__(self):
        self.sampler = ElasticSampler(self.length, self.batch)
        self.sums = Accumulator(epochs=self.epochs)
        self.states = [self.epochs, self.sampler, self.sums]
        for state in self.states:
            state.bind(self.comm)
            state.join({state.name: state for state in self.states})

    def resumed(self):
        """Save what there is, and make the program that restores it."""
        self.sums.combine([self.sums.part()])
        self.sums.combined()
        fresh = Program(self.comm, self.length, self.batch, self.every, told=self.told)
        for saved, state in zip(self.states, fresh.states, strict=True):
            carry(saved, state)
        return fresh

    def tell(self, *where):
        with self.sums.synchronized():
            told = dict(self.sums)
        assert self.told.setdefault(where, told) == told, where

    def run(self, until, cut=None):
        """Train; leave where ``cut`` says that the job is killed after a save."""

        def save(*where):
            if where == cut:
                raise CutOff

        for epoch in remaining_epochs_until(until, self.epochs):
            self.sampler.set_epoch(epoch)
            self.sums["begun"] += 1
            self.tell(epoch, "before")
            for number, samples in enumerate(self.sampler, self.sampler.batch_index):
                self.sums["samples"] += len(samples)
                if number % self.every == 0:
                    self.tell(epoch, number, "early")
                self.sampler.record_batch()
                if number % self.every == 0:
                    self.tell(epoch, number, "late")
                save(epoch, number)
            save(epoch, "trained")
            self.sums["evaluated"] += 1
            self.tell(epoch, "after")
            save(epoch, "after")
            self.epochs.done()
            save(epoch, "done")


EPOCHS = 3


@given(
    length=st.integers(1, 12),
    batch=st.integers(1, 5),
    every=st.integers(1, 4),
    data=st.data(),
)
def test_cut_off_anywhere_it_tells_what_an_undisturbed_run_does(length, batch, every, data):
    comm = Communicator(MPI.COMM_SELF)
    undisturbed = Program(comm, length, batch, every)
    undisturbed.run(EPOCHS)
    places = [*range(len(undisturbed.sampler)), "trained", "after", "done"]
    everywhere = [(epoch, place) for epoch in range(EPOCHS) for place in places]
    cuts = data.draw(st.lists(st.sampled_from(everywhere), max_size=4, unique=True))
    program = Program(comm, length, batch, every, told=undisturbed.told)
    for cut in sorted(cuts, key=everywhere.index):
        with pytest.raises(CutOff):
            program.run(EPOCHS, cut)
        # The loop is left by an exception, after what a save has seen.
        program.epochs.finished = cut[0] + (cut[1] == "done")
        program = program.resumed()
    program.run(EPOCHS)
    assert program.sums._results == undisturbed.sums._results
    comm.close()
