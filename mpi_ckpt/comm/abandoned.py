# SPDX-License-Identifier: Apache-2.0
"""Holds what was posted to MPI and may never be carried out. Not collective."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["keep"]

# MPI: what was given up is still posted, and is carried out when a late rank comes. Its
# buffers must not become somebody else's memory until then: here is who holds them.
_ABANDONED: list[object] = []


def keep(posted: Sequence[object]) -> None:
    """Hold requests and buffers for as long as the process lives. Not collective."""
    _ABANDONED.extend(posted)
