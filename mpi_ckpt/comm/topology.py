# SPDX-License-Identifier: Apache-2.0
"""Which ranks share a host, and the chain of hosts that a broadcast runs along. Pure.

Hosts are told apart by name. Two of one name count as one, and one of two names as two:
then a broadcast is slower than it could be, and as right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.options import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.options import Ranks

__all__ = ["Link", "Topology", "choose_ranks"]


@dataclass(frozen=True, slots=True)
class Link:
    """The place of one rank in a chain.

    Attributes:
        before: Rank that bytes come from over the network; None for none.
        after: Rank that they go to over the network; None for none.
        entry: Rank of the own node that spreads them there; maybe this one.
    """

    before: int | None
    after: int | None
    entry: int


@dataclass(frozen=True, slots=True)
class Topology:
    """The ranks by node.

    Attributes:
        nodes: Ranks of each node, ascending; the nodes in the order of their first.
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
        """Return where what one rank sends enters each node: at itself, else the leader.

        Not collective. Thread-safe.
        """
        home = self.node_of[source]
        return tuple(
            source if node == home else leader for node, leader in enumerate(self.leaders)
        )

    def chain(self, source: int) -> tuple[int, ...]:
        """Return the entries in the order that bytes pass them, from the source on.

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
    """Return the ranks that do a work, root first.

    Not collective. Thread-safe.

    Args:
        ranks: How they are chosen; of a host the lowest.
        topology: The ranks by host.
    """
    if ranks == "all":
        return tuple(range(len(topology.node_of)))
    if ranks == "node":
        return topology.leaders
    return (ROOT,)
