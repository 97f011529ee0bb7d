# SPDX-License-Identifier: Apache-2.0
"""A Python value that differs between ranks by nature."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import RestoreError
from mpi_ckpt.states.packed import pack, unpack
from mpi_ckpt.states.ranked import RankedState

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
            one.

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
        return pack(self.value)

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
        values = list(self._resize([unpack(part) for part in parts], size))
        if len(values) != size:
            raise RestoreError(
                f"state {self.name!r}: resize returned {len(values)} values for {size} "
                "ranks"
            )
        return [pack(value) for value in values]

    def open_part(self, part: bytes, saved: int) -> Callable[[], None]:
        """See `RankedState`. Not collective."""
        value = unpack(part) if part else None

        def take() -> None:
            if part:
                self.value = value
            if self._rank == 0 and saved > self._size:
                logger.warning(
                    "state %r: the values of saved ranks %d to %d go to no rank; give "
                    "PerRankState a resize to share them out",
                    self.name,
                    self._size,
                    saved - 1,
                )

        return take
