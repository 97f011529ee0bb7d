# SPDX-License-Identifier: Apache-2.0
"""Says why a job stops, and what its last save is good for. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_REASONS_MAX = 4


def join_reasons(parts: Sequence[bytes]) -> str:
    """Return the reasons of all ranks in words; a few at most."""
    reasons = [part.decode() for part in parts if part]
    more = len(reasons) - _REASONS_MAX
    cut = "; ".join(reasons[:_REASONS_MAX])
    return f"{cut} and {more:,} more ranks" if more > 0 else cut


def only_on_hosts(place: str, root: Path) -> str:
    """Return what to do about a last save that hosts alone keep.

    Args:
        place: The path of the local level.
        root: The checkpoint directory.
    """
    return (
        " on the hosts alone, as a save to the directory would not be durable before the "
        f"job ends. A restart on these hosts finds it; `mpi-ckpt rescue {place} {root}`, "
        "one process on each of them, copies it to the directory"
    )
