# SPDX-License-Identifier: Apache-2.0
"""Chooses the samples that this rank trains on next, and makes batches of them."""

from __future__ import annotations

import logging
import sys
from numbers import Integral
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.errors import CheckpointError, OptionsError, StateMismatchError
from mpi_ckpt.state import Arrival, Capture, Change, LeafState, Structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaves.leaf import LeafSpec

__all__ = [
    "ElasticCollate",
    "ElasticSampler",
    "count_batches",
    "epoch_order",
    "global_batches",
]

logger = logging.getLogger(__name__)


class ElasticSampler(LeafState):
    """A batch sampler for data-parallel training that resumes in mid-epoch.

    The order of an epoch follows from ``(seed, epoch)`` alone. It is cut into global
    batches, the same for any number of ranks, if a batch has at least two samples for each
    rank; each rank takes every ``size``-th sample of a batch, starting at its rank number.
    The position is one number, so a run that goes on with another number of ranks sees
    every sample of the epoch exactly once.

    All ranks see the same number of batches, at most one sample apart in length. A batch is
    empty in only one case: a restart finds fewer samples left in the epoch than it has
    ranks. Then one batch is left, and the last ranks have no sample of it; see
    `ElasticCollate`.

    Give it to a manager, which sets its rank, before the first batch is requested. Use as
    ``DataLoader(dataset, batch_sampler=sampler)``, and call `record_batch` after training
    on a batch: a loader with workers requests batches ahead of that. A loader draws a seed
    from torch's global stream whenever it is iterated, also when resumed in mid-epoch; for
    a run that is the same bit for bit, give the loader its own ``generator``, such as
    ``torch.Generator().manual_seed(epoch)``.

    Its length, and so the loader's, is always that of a whole epoch: schedules are computed
    from it before anything is restored. `batch_index` and `remaining` give the position.

    Args:
        length: Samples in the data set.
        batch_size: Samples in a global batch, over all ranks.
        shuffle: Whether each epoch has its own order.
        seed: Seed of the orders.
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
        numbers: dict[str, object] = {"length": length, "batch_size": batch_size}
        numbers["seed"] = seed
        for what, number in numbers.items():
            if not isinstance(number, Integral):
                wanted = "a whole number" if what == "seed" else "a number of samples"
                raise OptionsError(
                    f"{what} is of type {type(number).__name__}: {wanted}, as in "
                    "ElasticSampler(len(dataset), batch_size=256)"
                )
        if length < 1 or batch_size < 1 or not 0 <= seed < 2**32:
            raise OptionsError(
                f"a sampler of {length} samples in batches of {batch_size} with seed "
                f"{seed}: length and batch_size must be at least 1, seed 0 to 2^32 - 1"
            )
        # Plain ones: what is saved is JSON, which lacks NumPy's numbers.
        self._length = int(length)
        self._batch_size = int(batch_size)
        self._shuffle = bool(shuffle)
        self._seed = int(seed)
        self._comm: Communicator | None = None
        self._announced_length: int | None = None
        self._iterating = 0
        self._given = 0
        self._recorded = 0
        self._has_warned = False
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
        if self._announced_length not in (None, len(self)) and comm.is_root:
            logger.warning(
                "sampler %r: an epoch has %d batches with %d ranks, not %d, its length "
                "before it knew the ranks: ask for the length after the manager is made",
                *(self.name, len(self), comm.size, self._announced_length),
            )

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch; does nothing if that epoch is being sampled. Not collective.

        So a resumed loop that calls it first keeps its position. A call with the next epoch
        at the end of a loop's body, before a save there, marks this epoch as done: it will
        not be entered again.
        """
        if epoch != self.epoch:
            self.epoch = epoch
            self.consumed = 0

    def record_batch(self) -> None:
        """Note that the training has used the next global batch.

        Not collective, but every rank must call it equally often: before
        ``manager.step()``, so that a save includes the batch.
        """
        batches = self._batches(self.consumed, self._ranks().size)
        _, self.consumed = next(batches, (self.consumed, self._length))
        self._recorded += 1

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch. Not collective.

        It is known before the sampler is bound to ranks, if a batch has two samples for
        each.
        """
        whole = self._count(0)
        if self._comm is None:
            self._announced_length = whole
        return whole

    @property
    def remaining(self) -> int:
        """The number of batches left in this epoch."""
        return self._count(self.consumed)

    @property
    def batch_index(self) -> int:
        """The number, from 0, of the next batch: for ``enumerate(loader, batch_index)``."""
        return self._count(0) - self._count(self.consumed)

    @property
    def is_exhausted(self) -> bool:
        """Whether the training has used every sample of this epoch."""
        return self.consumed >= self._length

    @property
    def is_within(self) -> bool:
        """Whether a loop over batches is running on this rank, as far as known.

        It is until all batches were requested and, since a loader with workers requests
        ahead, recorded; in a loop that records none, until all were requested.
        """
        return self._iterating > 0 or 0 < self._recorded < self._given

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's part of each batch left in this epoch. Not collective."""
        order = epoch_order(self._length, self.epoch, self._seed, shuffle=self._shuffle)
        comm = self._ranks()
        self._given = self._recorded = 0
        self._iterating += 1
        try:
            for start, end in self._batches(self.consumed, comm.size):
                self._given += 1
                yield order[start + comm.rank : end : comm.size].tolist()
        finally:
            self._iterating -= 1

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        self._warn_of_unrecorded()
        # A loop over NumPy's numbers sets one of them.
        position = {"epoch": index(self.epoch), "consumed": index(self.consumed)}
        structure = {**self._identity(), **position, "batch_size": self._batch_size}
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
        if not problems and not all(
            type(count) is int and count >= 0 for count in position
        ):
            problems = ["it holds no position"]
        if problems:
            # Another order: going on with it would repeat some samples and miss others.
            raise StateMismatchError(
                f"state {self.name!r} does not fit: " + "; ".join(problems),
                problems=[f"{self.name}: {problem}" for problem in problems],
            )

        def adopt() -> None:
            self.epoch = structure["epoch"]
            self.consumed = structure["consumed"]

        return Arrival((), adopt)

    def observe_resize(
        self, structure: Structure, saved_size: int, size: int
    ) -> Callable[[], Change]:
        """See `LeafState`. Not collective."""
        saved, now = structure.get("batch_size"), self._batch_size
        text = f"{self.name}: a batch of {now} samples is {_share(now, size)} a rank"
        if type(saved) is not int:  # saved by a release that lacked it
            return lambda: Change(text)
        was = _share(saved, saved_size)
        if saved == now:
            return lambda: Change(f"{text}, no longer {was}")
        text = f"{text}; it was saved with batches of {saved}, {was} a rank"
        return lambda: Change(text, is_unusual=True)

    def _warn_of_unrecorded(self) -> None:
        # A loader with workers requests batches ahead; but by its second batch a training
        # that records any has recorded the first.
        forgotten = self._iterating > 0 and self._given > 1 and self._recorded == 0
        if forgotten and not self._has_warned and self._comm and self._comm.is_root:
            self._has_warned = True
            logger.warning(
                "sampler %r: a save in the middle of epoch %d, of which no batch was "
                "recorded: a job that resumes from it repeats the epoch from its first "
                "batch; call record_batch() after each batch, before manager.step()",
                *(self.name, self.epoch),
            )

    def _identity(self) -> dict[str, int | bool]:
        return {"length": self._length, "shuffle": self._shuffle, "seed": self._seed}

    def _ranks(self) -> Communicator:
        if self._comm is None:
            # As rank 0 of 1, every rank would train on the whole batch.
            raise CheckpointError(
                f"sampler {self.name!r} belongs to no manager yet and does not know its "
                "rank: pass it to a manager as a state"
            )
        return self._comm

    def _batches(self, consumed: int, size: int) -> Iterator[tuple[int, int]]:
        return global_batches(self._length, self._batch_size, consumed, size)

    def _count(self, consumed: int) -> int:
        size = 1 if self._comm is None else self._comm.size
        return count_batches(self._length - consumed, self._batch_size, size)


def _share(batch: int, size: int) -> str:
    least, more = divmod(batch, size)
    return f"{least} to {least + 1}" if more else str(least)


def epoch_order(
    length: int, epoch: int, seed: int, *, shuffle: bool
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the order of an epoch: int64, shape ``(length,)``.

    Not collective. Thread-safe. NumPy's legacy generator is used because its streams never
    change (NEP 19): an upgrade in mid-training must not change an order.
    """
    if not shuffle:
        return np.arange(length)
    generator = np.random.RandomState([seed, epoch])
    return generator.permutation(length)


def count_batches(left: int, batch_size: int, size: int) -> int:
    """Return how many batches `global_batches` yields, without making them.

    Not collective. Thread-safe.

    Args:
        left: Samples not yet used.
        batch_size: Samples in a global batch, at least ``size``.
        size: Number of ranks.
    """
    whole = max(left // batch_size - 1, 0)
    last = left - whole * batch_size
    if last <= 0:
        return whole
    return whole + (1 if last <= batch_size or last // 2 < size else 2)


def global_batches(
    length: int, batch_size: int, consumed: int, size: int
) -> Iterator[tuple[int, int]]:
    """Yield start and end of the batches left in an epoch.

    Not collective. Thread-safe. A rest at the end of more than one batch and less than two
    is halved, so that no batch is much smaller than the others; if that would leave a rank
    without a sample, it is one batch.

    Args:
        length: Samples in the epoch.
        batch_size: Samples in a global batch, at least ``size``.
        consumed: Samples already used.
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


class ElasticCollate:
    """Makes a batch of samples, also for a rank that has none.

    Use as ``collate_fn=ElasticCollate(dataset)`` of a loader whose batch sampler is an
    `ElasticSampler`. An empty batch has the form of any other, with length 0 in the first
    dimension. A loss summed over it is 0, as are its gradients, but a mean is NaN: sum over
    samples, add up over ranks, then divide by the samples of all ranks. Skip layers that
    cannot take an empty batch, such as batch normalization in training.

    Not collective. Spawned workers of a loader receive it pickled.

    Args:
        dataset: Its first sample defines the form.
        collate: Makes a batch of a list of samples; None for torch's own function.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 (anything with samples by number)
        collate: Callable[[Sequence[Any]], Any] | None = None,
    ) -> None:
        self._dataset = dataset
        self._collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:  # noqa: ANN401 (a batch)
        """Make a batch. Not collective."""
        if samples:
            return self._put_together(samples)
        return _emptied(self._put_together([self._dataset[0]]))

    def _put_together(self, samples: Sequence[Any]) -> Any:  # noqa: ANN401
        if self._collate is not None:
            return self._collate(samples)
        # A program with a loader has imported it.
        return sys.modules["torch.utils.data"].default_collate(samples)


def _emptied(batch: Any) -> Any:  # noqa: ANN401
    """Return a batch of one sample without that sample."""
    if isinstance(batch, dict):
        return type(batch)((key, _emptied(value)) for key, value in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_emptied, batch))
    if isinstance(batch, (list, tuple)):
        # Texts, which no tensor can hold, are a list as long as the batch.
        fields = () if all(isinstance(sample, (str, bytes)) for sample in batch) else batch
        return type(batch)(map(_emptied, fields))
    return batch[:0]
