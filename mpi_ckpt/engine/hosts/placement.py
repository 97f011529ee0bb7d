# SPDX-License-Identifier: Apache-2.0
"""Decides which hosts hold each file of a local generation. Pure.

Every host has all bytes that a sync has proven equal, so a copy costs no message: any host
can write any share. The hosts of one share lie in different failure domains. Hosts that
have the same load stay together, so that they form fixed groups as far as the numbers
allow: if two hosts are lost at once, most pairs of hosts hold no share alone (A. Cidon et
al., "Copysets", USENIX ATC 2013). With shares spread at random nearly every pair would.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from mpi_ckpt.digest import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHARES_A_HOST = 2
"""At least so many shares does each host hold: then hosts can read them in turns."""


def count_copies(copies: int | None, domains: Sequence[str]) -> int:
    """Return how many hosts can hold each byte: at most one in each failure domain.

    Not collective. Thread-safe.

    Args:
        copies: How many are wanted; None for one in each domain.
        domains: The failure domain of each host.
    """
    different = len(set(domains))
    return different if copies is None else min(copies, different)


def count_shares(hosts: int, copies: int) -> int:
    """Return into how many shares to cut a state, so that all hosts can hold as much.

    Not collective. Thread-safe.

    Args:
        hosts: Number of hosts.
        copies: Number of hosts that hold each share.
    """
    step = hosts // math.gcd(hosts, copies)  # so many shares fill the hosts evenly
    return step * math.ceil(_SHARES_A_HOST * hosts / (copies * step))


def place_files(
    sizes: Sequence[int],
    hosts: Sequence[str],
    domains: Sequence[str],
    copies: int,
    bound: Sequence[int | None] = (),
) -> list[tuple[int, ...]]:
    """Choose the hosts that hold each file, so that all hosts hold about as many bytes.

    Not collective. Thread-safe. The same arguments give the same result on every rank.

    Args:
        sizes: Bytes of each file.
        hosts: Names of the hosts.
        domains: The failure domain of each host; at least ``copies`` different ones.
        copies: Number of hosts that hold each file.
        bound: For each file the index of a host that must hold it; None for none. Shorter
            than ``sizes``: the rest is not bound.

    Returns:
        For each file the indices of its hosts, ascending, all of different domains.
    """
    # By a digest of the name, so that hosts of neighbouring names, which often share a
    # rack that nobody has named, do not always hold the same shares.
    order = sorted(range(len(hosts)), key=lambda host: digest_bytes(hosts[host].encode()))
    turn = {host: place for place, host in enumerate(order)}
    loads = [0] * len(hosts)
    heap = [(0, turn[host], host) for host in range(len(hosts))]
    heapq.heapify(heap)
    must = [*bound, *[None] * (len(sizes) - len(bound))]
    placed: list[tuple[int, ...]] = [()] * len(sizes)
    largest_first = sorted(range(len(sizes)), key=lambda n: (must[n] is None, -sizes[n], n))
    for number in largest_first:
        first = must[number]
        chosen = [] if first is None else [first]
        used = {domains[host] for host in chosen}
        passed = []
        while len(chosen) < copies:
            entry = heapq.heappop(heap)
            load, _, host = entry
            if load != loads[host]:
                continue  # an old entry: the host has a newer one
            if domains[host] in used:
                passed.append(entry)
                continue
            chosen.append(host)
            used.add(domains[host])
        for host in chosen:
            loads[host] += sizes[number]
            heapq.heappush(heap, (loads[host], turn[host], host))
        for entry in passed:
            if entry[2] not in chosen:
                heapq.heappush(heap, entry)
        placed[number] = tuple(sorted(chosen))
    return placed
