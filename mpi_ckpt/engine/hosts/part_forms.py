# SPDX-License-Identifier: Apache-2.0
"""Compares what must be alike in the parts of all ranks, of which no rank has all.

A save to the directory lets root see the structures of all parts. Here the ranks compare a
digest, and root asks for more only if it differs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mpi_ckpt.comm import agree, gather_bytes, meet
from mpi_ckpt.errors import StageError
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.states.unshared.ranked import RankedState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.engine.sync.captured import CapturedState
    from mpi_ckpt.state import State

_COMPARING = "comparing the parts of ranks"


def parts_on_hosts(session: Session, states: Sequence[State]) -> frozenset[str]:
    """Return the names of the states whose parts stay on the hosts of their ranks.

    Not collective: the same on every rank. A copy in memory must hold all parts: then root
    has them anyway, and gives them to the hosts.
    """
    if session.memory is not None:
        return frozenset()
    return frozenset(state.name for state in states if isinstance(state, RankedState))


def compare_parts(comm: Communicator, captured: Sequence[CapturedState]) -> None:
    """Compare the parts that ranks have captured as cut leaves, one allreduce in all.

    Collective. Main thread only.

    Args:
        comm: The communicator.
        captured: The contents of this rank.

    Raises:
        StageError: On every rank, if the parts do not belong together.
        DivergedError: On every rank, if something that all ranks share differs.
    """
    parts = [one for one in captured if isinstance(one.state, RankedState) and one.cut]

    def describe() -> bytes:
        values = []
        for one in parts:
            assert isinstance(one.state, RankedState)
            with concerning(f"state {one.name!r}"):
                # The first leaf of a part is its structure.
                text = bytes((one.cut[0].tiles or ())[0].buffer.read())
                values.append(one.state.alike(json.loads(text)))
        return json.dumps(values, sort_keys=True).encode()

    met = meet(comm, _COMPARING, describe, error=StageError, digest=digest_bytes)
    if met.is_alike:
        return
    gathered = gather_bytes(comm, met.result, _COMPARING)

    def compare() -> None:
        of_ranks = [json.loads(one) for one in gathered]
        for number, one in enumerate(parts if comm.is_root else ()):
            assert isinstance(one.state, RankedState)
            with concerning(f"state {one.name!r}"):
                one.state.compare([values[number] for values in of_ranks])

    agree(comm, _COMPARING, compare, error=StageError)
