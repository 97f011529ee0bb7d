# SPDX-License-Identifier: Apache-2.0
"""What the manifest of a local generation says beyond that of any other. Pure.

Such a generation lies on several hosts, each with some of its files; all have this same
manifest. A manifest is of version 3 if, and only if, it has this section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpi_ckpt.storage.format.json_values import as_integer, as_list, as_text

_NUMBER_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class LocalSet:
    """Where the files of a local generation are, and where it stands in the history.

    Attributes:
        run: The run that saved it.
        base: The highest number of a generation in the directory at that time.
        directory: The checkpoint directory, as root saw it.
        hosts: Names of the hosts; the first is that of root.
        domains: The failure domain of each host.
        copies: Number of hosts that hold each file.
        holders: For each file of the manifest the indices of its hosts.
    """

    run: str
    base: int
    directory: str
    hosts: tuple[str, ...]
    domains: tuple[str, ...]
    copies: int
    holders: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the section of a manifest. Not collective. Thread-safe."""
        return {
            "run": self.run,
            "base": self.base,
            "directory": self.directory,
            "hosts": self.hosts,
            "domains": self.domains,
            "copies": self.copies,
            "holders": self.holders,
        }

    @classmethod
    def from_json(cls, values: Any, files: int) -> LocalSet:  # noqa: ANN401 (JSON)
        """Return the section of a manifest. Not collective. Thread-safe.

        Args:
            values: The section, from a file that is not trusted.
            files: Number of files in the manifest.

        Raises:
            ValueError: On the calling rank, if it breaks a rule.
        """
        hosts = tuple([as_text(host) for host in as_list(values["hosts"])])
        domains = tuple([as_text(domain) for domain in as_list(values["domains"])])
        holders = tuple(
            [
                tuple([as_integer(host, len(hosts) - 1) for host in as_list(one)])
                for one in as_list(values["holders"])
            ]
        )
        if len(domains) != len(hosts) or len(holders) != files:
            raise ValueError("the lists of hosts do not have the right lengths")
        return cls(
            as_text(values["run"]),
            as_integer(values["base"], _NUMBER_MAX),
            as_text(values["directory"]),
            hosts,
            domains,
            as_integer(values["copies"], len(hosts)),
            holders,
        )
