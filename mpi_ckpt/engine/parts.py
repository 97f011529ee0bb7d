# SPDX-License-Identifier: Apache-2.0
"""States of which every rank holds a part: root gets the parts and puts them together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, agree_on_root, gather_bytes
from mpi_ckpt.errors import StageError
from mpi_ckpt.state import PartsState, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator

__all__ = ["combine_parts"]


def combine_parts(comm: Communicator, states: Sequence[State]) -> None:
    """Bring the parts of all ranks to root, for the states that have parts.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        states: The same states in the same order on every rank.

    Raises:
        StageError: On every rank, if a part cannot be given or taken on any.
    """
    for state in states:
        if not isinstance(state, PartsState):
            continue
        doing = f"collecting the parts of state {state.name!r}"
        part = agree(comm, doing, state.part, error=StageError)
        parts = gather_bytes(comm, part, doing)

        def combine(state: PartsState = state, parts: list[bytes] = parts) -> None:
            state.combine(parts)

        agree_on_root(comm, doing, combine, error=StageError)
        state.combined()
