# SPDX-License-Identifier: Apache-2.0
"""Starts ``mpi-ckpt rescue`` on hosts that the next attempt does not use. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_ckpt.cli.restart.launching import Host, launch_command

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from mpi_ckpt.cli.restart.launching import Launcher


@dataclass(frozen=True, slots=True)
class Salvage:
    """What is to be copied from hosts.

    Attributes:
        local: The path that the program gives to `Local`.
        directory: Its checkpoint directory.
    """

    local: str
    directory: Path


def salvage_command(
    launcher: Launcher, size: int, hosts: Sequence[str], salvage: Salvage
) -> list[str]:
    """Return the command that copies, with one process on each host if they are known.

    Args:
        launcher: The launcher.
        size: How many ranks the job had.
        hosts: Names of the hosts; empty if the launcher finds them.
        salvage: What is to be copied.
    """
    words = ("rescue", salvage.local, str(salvage.directory))
    program = [sys.executable, "-m", "mpi_ckpt", *words]
    places = [Host(name) for name in hosts]
    return launch_command(launcher, len(places) or size, places, program)


def left_behind(
    last: Sequence[str], there: Collection[str], chosen: Collection[str]
) -> bool:
    """Return whether hosts of the last attempt are there, and not in the next one.

    Args:
        last: The hosts of the last attempt.
        there: The hosts that can be used.
        chosen: Those of the next attempt.
    """
    return any(name in there and name not in chosen for name in last)
