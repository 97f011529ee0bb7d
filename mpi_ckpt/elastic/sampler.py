# SPDX-License-Identifier: Apache-2.0
"""Which samples this rank trains on next, however many ranks there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.errors import CheckpointError, OptionsError, StateMismatchError
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaf import LeafSpec

__all__ = ["ElasticSampler", "epoch_order", "global_batches"]


class ElasticSampler(LeafState):
    """A batch sampler for data-parallel training that resumes in mid-epoch.

    The order of an epoch follows from ``(seed, epoch)`` alone. It is cut into global
    batches, the same for any number of ranks, if a batch has at least two samples for
    each; each rank takes every ``size``-th sample of a batch, from its own rank on. What
    was trained on is one number, so a run that goes on with another number of ranks sees
    every sample of the epoch exactly once.

    All ranks see the same number of batches, at most one sample apart in length. None is
    empty but in one case: a restart finds fewer samples left of the epoch than it has
    ranks. Then there is one batch left, and the last ranks have no sample of it; see
    `ElasticCollate`.

    Give it to a manager, which tells it the rank, before the first batch is asked for.
    Use as ``DataLoader(dataset, batch_sampler=sampler)``, and call `record_batch` when a
    batch was trained on: a loader with workers asks for batches ahead of that. A loader
    draws a seed from torch's global stream whenever it is iterated, also when resumed in
    mid-epoch; for a run that is the same bit for bit, give it a ``generator`` of its own.

    Args:
        length: Samples in the data set.
        batch_size: Samples in a global batch, over all ranks.
        shuffle: Whether each epoch has an order of its own.
        seed: Decides the orders.
        name: As for `mpi_ckpt.State`.

    Attributes:
        epoch: The epoch being sampled; see `set_epoch`.
        consumed: Samples of this epoch that all ranks together have trained on.

    Raises:
        OptionsError: On every rank that makes it, if a number is out of range.
        RegistrationError: On every rank that makes it, if the name is illegal.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        name: str = "sampler",
    ) -> None:
        super().__init__(name, sync="check")
        if length < 1 or batch_size < 1 or not 0 <= seed < 2**32:
            raise OptionsError(
                f"a sampler of {length} samples in batches of {batch_size} with seed "
                f"{seed}: length and batch_size must be at least 1, seed 0 to 2^32 - 1"
            )
        self._length = length
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._comm: Communicator | None = None
        self.epoch = 0
        self.consumed = 0

    def bind(self, comm: Communicator) -> None:
        """See `LeafState`. Not collective.

        Raises:
            OptionsError: On every rank, if a batch has fewer samples than there are
                ranks.
        """
        if comm.size > min(self._length, self._batch_size):
            raise OptionsError(
                f"{comm.size} ranks cannot share batches of "
                f"{min(self._length, self._batch_size)} samples"
            )
        self._comm = comm

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch; does nothing if that epoch is being sampled. Not collective.

        So a resumed loop that calls it first keeps its position.
        """
        if epoch != self.epoch:
            self.epoch = epoch
            self.consumed = 0

    def record_batch(self) -> None:
        """Note that the next global batch was trained on.

        Not collective, but every rank must call it equally often: before
        ``manager.step()``, so that a save knows of the batch.
        """
        batches = self._batches(self._ranks())
        _, self.consumed = next(batches, (self.consumed, self._length))

    def __len__(self) -> int:
        """Return the number of batches left in this epoch. Not collective."""
        return sum(1 for _ in self._batches(self._ranks()))

    @property
    def batches_in_epoch(self) -> int:
        """The number of batches of a whole epoch."""
        size = self._ranks().size
        return sum(1 for _ in global_batches(self._length, self._batch_size, 0, size))

    def __iter__(self) -> Iterator[list[int]]:
        """Give this rank's part of each batch left in this epoch. Not collective."""
        order = epoch_order(self._length, self.epoch, self._seed, shuffle=self._shuffle)
        comm = self._ranks()
        for start, end in self._batches(comm):
            yield order[start + comm.rank : end : comm.size].tolist()

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        structure = {**self._identity(), "epoch": self.epoch, "consumed": self.consumed}
        return Capture(structure, ())

    def prepare(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],  # noqa: ARG002
        *,
        strict: bool,  # noqa: ARG002
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        saved = structure if isinstance(structure, dict) else {}
        problems = [
            f"{key} is saved as {saved.get(key)}, the program has {value}"
            for key, value in self._identity().items()
            if saved.get(key) != value
        ]
        position = saved.get("epoch"), saved.get("consumed")
        if not problems and not all(type(one) is int and one >= 0 for one in position):
            problems = ["it holds no position"]
        if problems:
            # Another order: going on in it would repeat some samples and miss others.
            raise StateMismatchError(
                f"state {self.name!r} does not fit: " + "; ".join(problems),
                problems=[f"{self.name}: {problem}" for problem in problems],
            )

        def adopt() -> None:
            self.epoch = structure["epoch"]
            self.consumed = structure["consumed"]

        return Arrival((), adopt)

    def _identity(self) -> dict[str, int | bool]:
        return {"length": self._length, "shuffle": self._shuffle, "seed": self._seed}

    def _ranks(self) -> Communicator:
        if self._comm is None:
            # As rank 0 of 1, every rank would train on the whole batch.
            raise CheckpointError(
                f"sampler {self.name!r} belongs to no manager yet and does not know its "
                "rank: give it to one among its states"
            )
        return self._comm

    def _batches(self, comm: Communicator) -> Iterator[tuple[int, int]]:
        return global_batches(self._length, self._batch_size, self.consumed, comm.size)


def epoch_order(
    length: int, epoch: int, seed: int, *, shuffle: bool
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the order of an epoch: int64, shape ``(length,)``.

    Not collective. Thread-safe. NumPy's legacy generator is used because its streams are
    frozen for good (NEP 19): an order must not change with an upgrade in mid-training.
    """
    if not shuffle:
        return np.arange(length)
    generator = np.random.RandomState([seed, epoch])
    return generator.permutation(length)


def global_batches(
    length: int, batch_size: int, consumed: int, size: int
) -> Iterator[tuple[int, int]]:
    """Give start and end of the batches left in an epoch.

    Not collective. Thread-safe. What is left at the end, more than a batch and less than
    two, is halved, so that no batch is much smaller than the others; where that would
    leave a rank without a sample it is one batch.

    Args:
        length: Samples in the epoch.
        batch_size: Samples in a global batch, at least ``size``.
        consumed: Samples done with.
        size: Number of ranks.
    """
    start = consumed
    while start < length:
        left = length - start
        if left >= 2 * batch_size:
            end = start + batch_size
        elif left <= batch_size or left // 2 < size:
            end = length
        else:
            end = start + (left + 1) // 2
        yield start, end
        start = end
