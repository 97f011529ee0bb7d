# SPDX-License-Identifier: Apache-2.0
"""Groups ranks by host, and plans the chain of hosts for a broadcast. Pure.

Names tell hosts apart. Two hosts of one name count as one, and a host of two names as two:
then a broadcast is slower than necessary, but correct. This module also turns buffers into
messages: it fuses small ones and cuts large ones, to lengths that suit such a chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.options import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


@dataclass(frozen=True, slots=True)
class Topology:
    """The ranks by node.

    Attributes:
        nodes: Ranks of each node, ascending; nodes are ordered by their first rank.
        node_of: Index of each rank's node.
    """

    nodes: tuple[tuple[int, ...], ...]
    node_of: tuple[int, ...]

    @classmethod
    def of(cls, hosts: Sequence[str]) -> Topology:
        """Group ranks by the name of their host. Not collective. Thread-safe."""
        index = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
        node_of = tuple(index[host] for host in hosts)
        nodes: list[list[int]] = [[] for _ in index]
        for rank, node in enumerate(node_of):
            nodes[node].append(rank)
        return cls(tuple(map(tuple, nodes)), node_of)

    @property
    def leaders(self) -> tuple[int, ...]:
        """The first rank of each node."""
        return tuple(ranks[0] for ranks in self.nodes)

    def entries(self, source: int) -> tuple[int, ...]:
        """Return the rank by which a source's bytes enter each node.

        The source itself on its own node, else the leader. Not collective. Thread-safe.
        """
        home = self.node_of[source]
        return tuple(
            source if node == home else leader for node, leader in enumerate(self.leaders)
        )

    def chain(self, source: int) -> tuple[int, ...]:
        """Return the entries in the order in which bytes pass them, from the source on.

        Not collective. Thread-safe.
        """
        entries, home = self.entries(source), self.node_of[source]
        return entries[home:] + entries[:home]

    def link(self, rank: int, source: int) -> Link:
        """Return a rank's place in the chain of a source. Not collective. Thread-safe."""
        entry = self.entries(source)[self.node_of[rank]]
        if rank != entry:
            return Link(None, None, entry)
        chain = self.chain(source)
        at = chain.index(rank)
        before = chain[at - 1] if at else None
        after = chain[at + 1] if at + 1 < len(chain) else None
        return Link(before, after, entry)


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
