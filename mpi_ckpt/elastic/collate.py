# SPDX-License-Identifier: Apache-2.0
"""Makes batches of a torch data loader, also empty ones."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ElasticCollate"]


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
