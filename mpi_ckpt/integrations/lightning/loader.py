# SPDX-License-Identifier: Apache-2.0
"""A data loader with which Lightning resumes in mid-epoch, with any number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.elastic.sampler import ElasticSampler

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ElasticLoader"]


class ElasticLoader:
    """A torch ``DataLoader`` over an `ElasticSampler`, as Lightning wants to see it.

    It would put a sampler of its own into a plain ``DataLoader``. Give this one to the
    trainer and to `MPICheckpoint`, which saves its position.

    Args:
        dataset: The data set, of a known length.
        batch_size: Samples in a global batch, over all ranks. For replicas that average
            their gradients evenly: a multiple of the number of ranks.
        shuffle: Whether each epoch has an order of its own.
        seed: Decides the orders.
        kwargs: As for ``torch.utils.data.DataLoader``. Unless it is given, ``generator``
            is one of its own, so that a resumed run draws from the global stream what
            an uninterrupted one does.

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
        """Give this rank's part of each batch left in this epoch. Not collective."""
        return iter(self._loader)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # What Lightning asks of a loader: its data set, its workers.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the sampler is a state of its own. Not collective.

        Lightning takes a loader without this for one that cannot resume.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing. Not collective."""
