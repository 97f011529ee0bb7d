# SPDX-License-Identifier: Apache-2.0
"""Chooses the samples that this rank trains on, as Horovod elastic does."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from mpi_ckpt.integrations.horovod.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sized

__all__ = ["HorovodSampler"]


class HorovodSampler:
    """Divides a data set among the ranks, and again when their number has changed.

    Use as ``DataLoader(dataset, sampler=sampler)``, give it to the state, and call
    `record_batch` after each batch. The order of an epoch is Horovod's own, so this sampler
    can load the stored state of Horovod's sampler.

    Each rank gets the same number of samples; if they cannot be divided evenly, the last
    ranks repeat some of the first samples. `set_epoch`, `load_state_dict` and `reset`
    divide the rest of the epoch again; `record_batch` does not.

    Not collective: nothing here communicates.

    Args:
        dataset: Anything with a length.
        shuffle: Whether each epoch has its own order.
        seed: Seed of the orders; the same on every rank.

    Attributes:
        epoch: The epoch being sampled.
        processed_num: Samples of this epoch that all ranks together have trained on.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.processed_num = 0
        # Taken from the job on first use: making a sampler starts no MPI.
        self._place: tuple[int, int] | None = None
        self._begin = 0
        self._share: list[int] | None = None

    @property
    def rank(self) -> int:
        """This rank."""
        return self._find_place()[0]

    @property
    def num_replicas(self) -> int:
        """Number of ranks."""
        return self._find_place()[1]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, or go on in it if it is the current one.

        So a program may call it at the end of an epoch, as Horovod requires, or at the
        beginning.
        """
        if epoch != self.epoch:
            self.epoch = epoch
            self.processed_num = 0
        self._share_out()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:  # noqa: ARG002 (Horovod's)
        """Note that every rank has trained on a batch.

        Args:
            batch_idx: Ignored.
            batch_size: Samples in the batch of this rank; the same on every rank.
        """
        done = self.processed_num + batch_size * self.num_replicas
        # Repeated samples do not count twice.
        self.processed_num = min(done, len(self.dataset))

    def state_dict(self) -> dict[str, int]:
        """Return epoch and position, as Horovod's sampler does."""
        return {"epoch": self.epoch, "processed_num": self.processed_num}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Take over a result of `state_dict`, and divide the rest of the epoch."""
        self.epoch = state_dict["epoch"]
        self.processed_num = state_dict["processed_num"]
        self._share_out()

    def reset(self) -> None:
        """Read the number of ranks again, and divide the rest of the epoch."""
        self._place = None
        self._share_out()

    def place(self, rank: int, size: int) -> None:
        """Set rank and size; if they changed, divide the rest of the epoch."""
        if self._place != (rank, size):
            self._place = (rank, size)
            self._share_out()

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's samples of the last division."""
        return iter(list(self._shared()))

    def __len__(self) -> int:
        """Return their number."""
        return len(self._shared())

    def _find_place(self) -> tuple[int, int]:
        if self._place is None:
            self._place = settings().find_place()
        return self._place

    def _share_out(self) -> None:
        self._begin, self._share = self.processed_num, None

    def _shared(self) -> list[int]:
        if self._share is None:
            rank, size = self._find_place()
            left = self._order()[self._begin :]
            per_rank = -(-len(left) // size)
            # If fewer samples are left than there are ranks, they repeat more than once.
            self._share = [left[i % len(left)] for i in range(rank, per_rank * size, size)]
        return self._share

    def _order(self) -> list[int]:
        order = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(self.seed + self.epoch).shuffle(order)
        return order
