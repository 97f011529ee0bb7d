# SPDX-License-Identifier: Apache-2.0
"""Provides a data loader that Lightning resumes in mid-epoch, with any number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.elastic.sampler import ElasticSampler

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ElasticLoader"]


class ElasticLoader:
    """A torch ``DataLoader`` over an `ElasticSampler`, in a form that Lightning accepts.

    Lightning would put its own sampler into a plain ``DataLoader``. Give this loader to the
    trainer and to `MPICheckpoint`, which saves its position.

    Args:
        dataset: The data set, of a known length.
        batch_size: Samples in a global batch, over all ranks. For replicas that average
            their gradients evenly, it must be a multiple of the number of ranks.
        shuffle: Whether each epoch has its own order.
        seed: Seed of the orders.
        kwargs: As for ``torch.utils.data.DataLoader``. By default ``generator`` is a
            private one, so that a resumed run draws the same numbers from the global stream
            as an uninterrupted run.

    Attributes:
        sampler: The sampler.

    Raises:
        OptionsError: On every rank that makes it, if a number is out of range.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 (a map-style data set)
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        from torch import Generator
        from torch.utils.data import DataLoader

        self.sampler = ElasticSampler(
            len(dataset), batch_size, shuffle=shuffle, seed=seed, name="loader"
        )
        kwargs.setdefault("generator", Generator())
        self._loader: Any = DataLoader(dataset, batch_sampler=self.sampler, **kwargs)

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch. Not collective."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's part of each batch left in this epoch. Not collective."""
        return iter(self._loader)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # Attributes that Lightning reads from a loader: its data set, its workers.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: the sampler is a separate state. Not collective.

        Lightning assumes that a loader without this method cannot resume.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing. Not collective."""
