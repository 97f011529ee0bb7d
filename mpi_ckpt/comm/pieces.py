# SPDX-License-Identifier: Apache-2.0
"""How buffers become messages: small ones fused, large ones cut. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Piece", "chain_piece_bytes", "plan_messages"]

_CHAIN_PIECE_BYTES = 1 << 20
_CHAIN_PIECE_BYTES_LEAST = 64 << 10
_FILLING_SHARE = 32


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


def chain_piece_bytes(total_bytes: int, hosts: int) -> int | None:
    """Return the length of the pieces that go along a chain of hosts.

    Not collective. Thread-safe.

    Args:
        total_bytes: What is to be sent.
        hosts: Length of the chain.

    Returns:
        Length in bytes; None where a chain is no gain.
    """
    # The last host has everything after as many turns as there are pieces, and one more
    # for each host that a piece is passed on by: while the chain fills, the last links
    # idle. Turns are short where pieces are: filling takes a thirty-second of the time or
    # less. But each piece costs a call and a round trip too, which below 64 KiB weigh as
    # much as its bytes, and above 1 MiB nothing.
    #
    # Too little to fill a chain goes faster by a tree: P pieces over H hosts take
    # P + H - 2 turns in the chain and P * log2(H), rounded up, in the tree. The chain
    # has no more turns, whatever H is, from P = H on.
    if hosts == 1 or total_bytes < hosts * _CHAIN_PIECE_BYTES_LEAST:
        return None
    filled = total_bytes // (_FILLING_SHARE * (hosts - 1))
    filled -= filled % _CHAIN_PIECE_BYTES_LEAST
    return min(max(filled, _CHAIN_PIECE_BYTES_LEAST), _CHAIN_PIECE_BYTES)
