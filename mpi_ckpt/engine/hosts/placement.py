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
from collections import Counter
from typing import TYPE_CHECKING

from mpi_ckpt.leaves.digest import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    loads: Sequence[int] = (),
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
        loads: Bytes that each host holds of other files; none by default.

    Returns:
        For each file the indices of its hosts, ascending, all of different domains.
    """
    turn = {host: place for place, host in enumerate(_mixed(hosts))}
    loads = list(loads) or [0] * len(hosts)
    heap = [(loads[host], turn[host], host) for host in range(len(hosts))]
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


def place_own_files(
    owners: Sequence[int], hosts: Sequence[str], domains: Sequence[str], copies: int
) -> list[tuple[int, ...]]:
    """Choose the hosts that hold what a host's ranks alone have: it, and others.

    Not collective. Thread-safe. The same arguments give the same result on every rank. As
    with shares, hosts form fixed groups; within a group each sends its files to the next
    ones, so that it also gets those of as many hosts.

    Args:
        owners: The host of each file, all different.
        hosts: Names of the hosts.
        domains: The failure domain of each host; at least ``copies`` different ones.
        copies: Number of hosts that hold each file.

    Returns:
        For each file the indices of its hosts, ascending, all of different domains.
    """
    seen: Counter[str] = Counter()
    rows: list[tuple[int, int]] = []
    for host in _mixed(hosts):
        rows.append((seen[domains[host]], host))  # the first host of each domain first
        seen[domains[host]] += 1
    circle = [host for _, host in sorted(rows, key=lambda row: row[0])]
    place = {host: number for number, host in enumerate(circle)}
    received, most = [0] * len(hosts), copies - 1
    placed: dict[int, tuple[int, ...]] = {}
    for owner in sorted(owners, key=place.__getitem__):
        chosen, used = [owner], {domains[owner]}
        while len(chosen) < copies:
            for number in _neighbours(place[owner], len(hosts), copies):
                host = circle[number]
                is_free = received[host] < most and domains[host] not in used
                if is_free:
                    chosen.append(host)
                    used.add(domains[host])
                    received[host] += 1
                if len(chosen) == copies:
                    break
            else:
                most += 1  # domains are of different sizes
        placed[owner] = tuple(sorted(chosen))
    return [placed[owner] for owner in owners]


def _neighbours(place: int, places: int, group: int) -> Iterator[int]:
    """Yield other places: those of the same group, then those after it, in circles."""
    last = max(places // group, 1) - 1
    number = min(place // group, last)
    start = number * group
    end = places if number == last else start + group
    for step in range(1, end - start):
        yield start + (place - start + step) % (end - start)
    for step in range(places - (end - start)):
        yield (end + step) % places


def _mixed(hosts: Sequence[str]) -> list[int]:
    # By a digest of the name, so that hosts of neighbouring names, which often share a
    # rack that nobody has named, do not always hold the same files.
    return sorted(range(len(hosts)), key=lambda host: digest_bytes(hosts[host].encode()))


def order_turns_of_files(holders: Sequence[Sequence[int]]) -> list[int]:
    """Choose a turn for each file that moves between hosts: no host has two in a turn.

    Not collective. Thread-safe. The same arguments give the same result on every rank.

    Args:
        holders: For each file the hosts that send or receive it.

    Returns:
        The turn of each file, from 0.
    """
    busy: dict[int, set[int]] = {}
    turns = []
    for hosts in holders:
        taken = set().union(*(busy.get(host, ()) for host in hosts))
        turn = next(number for number in range(len(taken) + 1) if number not in taken)
        for host in hosts:
            busy.setdefault(host, set()).add(turn)
        turns.append(turn)
    return turns
