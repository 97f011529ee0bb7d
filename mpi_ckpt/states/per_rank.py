# SPDX-License-Identifier: Apache-2.0
"""A Python value that differs between ranks by nature."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import RestoreError
from mpi_ckpt.states.ranked import RankedState
from mpi_ckpt.states.tree import flatten, leaf_kinds, make_leaf_value, unflatten
from mpi_ckpt.storage.stream import fill_leaves, read_form, write_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PerRankState"]

logger = logging.getLogger(__name__)


class PerRankState(RankedState):
    """A Python value of which every rank has its own: a reader's position, a cache.

    Every rank gets its own back when the number of ranks is the same. With another
    number, and without ``resize``, rank ``r`` gets that of saved rank ``r``; a rank
    beyond the saved ones keeps the value that it has; those of saved ranks beyond the
    last are left out, of which root warns.

    Args:
        name: As for `mpi_ckpt.State`; the same on every rank.
        value: This rank's: None, numbers, text, bytes, tensors, arrays, and lists,
            tuples, sets and dicts of them. Ranks may hold values of different forms.
        resize: Called in a restore on root alone, when the number of ranks has changed,
            with the values of all saved ranks in rank order and the number of ranks
            now; returns as many values. None: as said above.

    Attributes:
        value: The live value. Assign to it freely between saves; a restore assigns a new
            one, tensors in it on the host.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal.
    """

    contents = "values of ranks"
    count_key = "values"

    def __init__(
        self,
        name: str,
        value: Any = None,  # noqa: ANN401 (any nested value)
        *,
        resize: Callable[[list[Any], int], Sequence[Any]] | None = None,
    ) -> None:
        super().__init__(name)
        self.value = value
        self._resize = resize
        self.resizes = resize is not None

    def part(self) -> bytes:
        """See `PartsState`. Not collective."""
        return _encode(self.value)

    def source(self, rank: int, saved: int) -> int | None:
        """See `RankedState`. Not collective."""
        return rank if rank < saved else None

    def resize(self, parts: Sequence[bytes], size: int) -> list[bytes]:
        """See `RankedState`. Root only.

        Raises:
            RestoreError: On the calling rank, if the user's function returns another
                number of values.
        """
        assert self._resize is not None
        values = list(self._resize([_decode(part) for part in parts], size))
        if len(values) != size:
            raise RestoreError(
                f"state {self.name!r}: resize returned {len(values)} values for {size} "
                "ranks"
            )
        return [_encode(value) for value in values]

    def take(self, part: bytes, saved: int) -> None:
        """See `RankedState`. Not collective."""
        if part:
            self.value = _decode(part)
        if self._rank == 0 and saved > self._size:
            logger.warning(
                "state %r: the values of saved ranks %d to %d go to no rank; give "
                "PerRankState a resize to share them out",
                self.name,
                self._size,
                saved - 1,
            )


def _encode(value: Any) -> bytes:  # noqa: ANN401 (any nested value)
    flattened = flatten(value)
    stream = io.BytesIO()
    write_leaves(stream, flattened.structure, tuple(flattened.leaves.values()))
    return stream.getvalue()


def _decode(part: bytes) -> Any:  # noqa: ANN401 (any nested value)
    stream = io.BytesIO(part)
    structure, specs = read_form(stream)
    kinds = leaf_kinds(structure)
    made = [make_leaf_value(spec, kinds.get(spec.name, "")) for spec in specs]
    fill_leaves(stream, specs, [leaf for _, leaf in made])
    values = {spec.name: value for spec, (value, _) in zip(specs, made, strict=True)}
    return unflatten(structure, values)
