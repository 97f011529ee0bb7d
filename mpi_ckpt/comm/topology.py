# SPDX-License-Identifier: Apache-2.0
"""Groups ranks by host, and plans the chain of hosts for a broadcast. Pure.

Names tell hosts apart. Two hosts of one name count as one, and a host of two names as two:
then a broadcast is slower than necessary, but correct. This module also turns buffers into
messages: it fuses small ones and cuts large ones, to lengths that suit such a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from mpi_ckpt.options import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from mpi_ckpt.options import Ranks


@dataclass(frozen=True, slots=True)
class Link:
    """The place of one rank in a chain.

    Attributes:
        before: Rank that sends it bytes over the network; None for none.
        after: Rank that it sends them to over the network; None for none.
        entry: Rank that spreads them on this node; maybe this one.
    """

    before: int | None
    after: int | None
    entry: int


@dataclass(frozen=True, slots=True, eq=False)
class Topology:
    """The ranks by node: 4 bytes for each rank, and some for each node.

    Attributes:
        names: Host name of each node; nodes are ordered by their first rank.
        node_of: Index of each rank's node, shape (ranks,).
        leaders: The first rank of each node.
    """

    names: tuple[str, ...]
    node_of: NDArray[np.int32]
    leaders: tuple[int, ...]

    @classmethod
    def make(cls, names: Sequence[str], node_of: NDArray[np.int32]) -> Topology:
        """Return the topology of nodes that are ordered by their first rank.

        Not collective. Thread-safe.
        """
        _, first = np.unique(node_of, return_index=True)
        return cls(tuple(names), node_of, tuple(first.tolist()))

    @classmethod
    def of(cls, hosts: Sequence[str]) -> Topology:
        """Group ranks by the name of their host. Not collective. Thread-safe."""
        index = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
        return cls.make(tuple(index), np.array([index[h] for h in hosts], np.int32))

    @property
    def hosts(self) -> Hosts:
        """The host name of each rank."""
        return Hosts(self.names, self.node_of)

    def ranks_of(self, node: int) -> list[int]:
        """Return the ranks of a node, ascending. Not collective. Thread-safe."""
        ranks: list[int] = np.flatnonzero(self.node_of == node).tolist()
        return ranks

    def link(self, rank: int, source: int) -> Link:
        """Return a rank's place in the chain of a source.

        Not collective. Thread-safe. The chain begins with the source on its own node, and
        passes the leaders of the other nodes in order.
        """
        node, home = int(self.node_of[rank]), int(self.node_of[source])
        entry = self._entry(node, source)
        if rank != entry:
            return Link(None, None, entry)
        at, last = (node - home) % len(self.names), len(self.names) - 1
        return Link(
            None if at == 0 else self._entry(node - 1, source),
            None if at == last else self._entry(node + 1, source),
            entry,
        )

    def _entry(self, node: int, source: int) -> int:
        """Return the rank by which a source's bytes enter a node."""
        node %= len(self.names)
        return source if node == self.node_of[source] else self.leaders[node]


@dataclass(frozen=True, slots=True, eq=False)
class Hosts(Sequence[str]):
    """The host name of each rank, by the index of its node."""

    names: tuple[str, ...]
    node_of: NDArray[np.int32]

    @property
    def are_one(self) -> bool:
        """Whether all ranks are on one host."""
        return len(self.names) == 1

    def __len__(self) -> int:
        return len(self.node_of)

    @overload
    def __getitem__(self, rank: int) -> str: ...
    @overload
    def __getitem__(self, rank: slice) -> list[str]: ...
    def __getitem__(self, rank: int | slice) -> str | list[str]:
        if isinstance(rank, slice):
            return [self.names[node] for node in self.node_of[rank].tolist()]
        name: str = self.names[self.node_of[rank]]
        return name


def choose_ranks(ranks: Ranks, topology: Topology) -> tuple[int, ...]:
    """Return the ranks that share a task, root first.

    Not collective. Thread-safe.

    Args:
        ranks: How they are chosen; for ``"node"`` the lowest of each host.
        topology: The ranks by host.
    """
    if ranks == "all":
        return tuple(range(len(topology.node_of)))
    if ranks == "node":
        return topology.leaders
    return (ROOT,)


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

    Not collective. Thread-safe. The same lengths give the same messages on every rank. A
    message of one piece is sent without a copy; a message of several is a bucket, which
    must be packed. Only buffers below an eighth of a message are fused: copying larger ones
    costs more than the message that it saves.

    Args:
        lengths: Length of each buffer in bytes; zero-length ones get no message.
        message_bytes: Largest message in bytes; at least ``unit``.
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
    """Return the length of the pieces for a chain of hosts.

    Not collective. Thread-safe.

    Args:
        total_bytes: Bytes to send.
        hosts: Length of the chain.

    Returns:
        Length in bytes; None if a chain gains nothing.
    """
    # The last host has all bytes after one turn for each piece, and one more for each host
    # that passes pieces on: while the chain fills, the last links are idle. Short pieces
    # make short turns: filling takes a thirty-second of the time or less. But each piece
    # also costs a call and a round trip, which cost as much as its bytes below 64 KiB, and
    # almost nothing above 1 MiB.
    #
    # Too few bytes to fill a chain travel faster in a tree: for P pieces over H hosts, the
    # chain needs P+H-2 turns and the tree P*log2(H), rounded up. From P = H on the chain
    # needs no more turns than the tree, for any H.
    if hosts == 1 or total_bytes < hosts * _CHAIN_PIECE_BYTES_LEAST:
        return None
    filled = total_bytes // (_FILLING_SHARE * (hosts - 1))
    filled -= filled % _CHAIN_PIECE_BYTES_LEAST
    return min(max(filled, _CHAIN_PIECE_BYTES_LEAST), _CHAIN_PIECE_BYTES)
