# SPDX-License-Identifier: Apache-2.0
"""Notes of a program that its test reads afterwards with `tests.jobs.logged`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt import elastic


def note_event(log: Path, world: elastic.World, **values: object) -> None:
    """Append an event to the log, from the first rank of this world."""
    if world.rank == 0:
        with log.open("a") as file:
            file.write(json.dumps(values) + "\n")
