# SPDX-License-Identifier: Apache-2.0
"""How buffers become messages: small ones fused, large ones cut. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Piece", "plan_messages"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of one buffer: index of the buffer, start and end in bytes."""

    buffer: int
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


def plan_messages(
    lengths: Sequence[int], message_bytes: int, *, unit: int = 1
) -> Iterator[tuple[Piece, ...]]:
    """Cut buffers into messages of at most ``message_bytes``.

    Not collective. Thread-safe. The same lengths give the same messages on every rank.
    A message of one piece can be sent from where it lies; one of several is a bucket,
    to be packed. Only buffers below an eighth of a message are fused: copying larger
    ones costs more than the message it spares.

    Args:
        lengths: Length of each buffer in bytes; zero-length ones get no message.
        message_bytes: Most bytes of a message; at least ``unit``.
        unit: Cuts fall on multiples of this many bytes.
    """
    most = max(unit, message_bytes - message_bytes % unit)
    small = most // 8
    bucket: list[Piece] = []
    filled = 0
    for index, length in enumerate(lengths):
        if 0 < length <= small:
            if filled + length > most:
                yield tuple(bucket)
                bucket, filled = [], 0
            bucket.append(Piece(index, 0, length))
            filled += length
        else:
            for start in range(0, length, most):
                yield (Piece(index, start, min(start + most, length)),)
    if bucket:
        yield tuple(bucket)
