# SPDX-License-Identifier: Apache-2.0
"""Finds the hosts, from a file or from the site's script, and leaves out failing ones."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from mpi_ckpt.cli.command import CommandError
from mpi_ckpt.cli.doctor.machine import ask
from mpi_ckpt.cli.restart.launching import Host

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

FAILURES_FORGIVEN = 1
"""One loss may be the job's own doing, or an accident; the second shows the host."""

_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,250}[A-Za-z0-9])?)"
    r"(?:(?::|\s+slots\s*=\s*)(?P<slots>[1-9]\d{0,5}))?(?:\s+max[-_]slots\s*=\s*\d+)?"
)


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Read lines such as ``node1``, ``node1:4`` or ``node1 slots=4``. Pure.

    Comments and empty lines are skipped; slots of a repeated name are added up.

    Raises:
        ValueError: With the line that is not a host.
    """
    slots: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), 1):
        wanted = line.partition("#")[0].strip()
        if not wanted:
            continue
        match = _LINE.fullmatch(wanted)
        if match is None:
            raise ValueError(
                f"line {number}, {wanted[:80]!r}, is not of the form host:slots"
            )
        slots[match["name"]] += int(match["slots"] or 1)
    return tuple(Host(name, count) for name, count in slots.items())


def ask_hosts_script(
    script: Path, environ: Mapping[str, str], seconds: float
) -> tuple[Host, ...]:
    """Return the hosts that a script prints, as horovodrun's discovery scripts do.

    Raises:
        CommandError: If it cannot be run, fails, hangs, or prints other text.
    """
    printed, ended = ask([str(script)], environ, seconds, joined=False)
    if ended != "ended with code 0":
        raise CommandError(f"hosts script {script}: {ended}", kind="hosts")
    try:
        return parse_hosts(printed)
    except ValueError as error:
        raise CommandError(f"hosts script {script}: {error}", kind="hosts") from None


# Messages of launchers about a lost host, or one on which a rank was killed.
_COMPLAINTS = (
    re.compile(r"^\s*Remote daemon:.* on node (?P<host>\S+)", re.MULTILINE),  # Open MPI
    re.compile(r"\brank \d+ with PID \d+ on node (?P<host>\S+)\s+exited\s+on"),
    re.compile(r"\bRUNNING AT (?P<host>\S+)"),  # MPICH
    re.compile(r"^srun: error: Node failure on (?P<host>\S+)", re.MULTILINE),
    re.compile(r"^srun: error: (?P<host>[^\s:]+): tasks? \S+ Killed", re.MULTILINE),
    re.compile(r"(?:ssh: connect to host|Could not resolve hostname) (?P<host>[^\s:]+)"),
)


def suspects(said: str, hosts: Collection[str]) -> set[str]:
    """Return the hosts in a launcher's complaints. Pure.

    Args:
        said: The launcher's output.
        hosts: Names of the used hosts: no other word counts as one.
    """
    named = {
        found["host"].rstrip(".,:")
        for pattern in _COMPLAINTS
        for found in pattern.finditer(said)
    }
    return {host for host in hosts if host in named}


class HostBook:
    """Records which hosts have failed, and which have survived the last attempt.

    Survivors come first: what they keep on their disks then need not be read from the
    directory. Hosts that were complained of come last. Else the order is that of the list.

    A host that was missing from the list and is back starts without failures: it was
    probably repaired.

    Args:
        source: Returns the hosts; None if the launcher finds them itself.
        warn: Called if the source fails and its last answer is used.
    """

    def __init__(
        self, source: Callable[[], Sequence[Host]] | None, warn: Callable[[str], None]
    ) -> None:
        self._source = source
        self._warn = warn
        self._failures: Counter[str] = Counter()
        self._last: Sequence[Host] | None = None
        self._used: frozenset[str] = frozenset()
        self._blamed: frozenset[str] = frozenset()

    @property
    def is_known(self) -> bool:
        """Whether there is a list of hosts at all."""
        return self._source is not None

    @property
    def listed(self) -> frozenset[str]:
        """The hosts that the source has named last, those that are left out too."""
        return frozenset(host.name for host in self._last or ())

    def usable(self) -> list[Host]:
        """Get the hosts; return those that have not failed twice.

        Raises:
            CommandError: If the source fails and has never returned hosts.
        """
        if self._source is None:
            return []
        try:
            hosts = self._source()
        except CommandError as error:
            if self._last is None:
                raise
            self._warn(f"{error}; its last answer is used")
            hosts = self._last
        self._last = hosts
        names = {host.name for host in hosts}
        for gone in [name for name in self._failures if name not in names]:
            del self._failures[gone]
        usable = [h for h in hosts if self._failures[h.name] <= FAILURES_FORGIVEN]

        def order(host: Host) -> int:
            return 1 if host.name not in self._used else 2 * (host.name in self._blamed)

        return sorted(usable, key=order)

    def note_used(self, names: Collection[str]) -> None:
        """Note the hosts of an attempt."""
        self._used, self._blamed = frozenset(names), frozenset()

    def blame(self, names: Collection[str]) -> list[str]:
        """Note failed hosts; return those that are now left out."""
        self._blamed |= frozenset(names)
        self._failures.update(names)
        return sorted(n for n in names if self._failures[n] > FAILURES_FORGIVEN)
