# SPDX-License-Identifier: Apache-2.0
"""Brings states back from the memory of the ranks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import agree, any_of, bcast_bytes
from mpi_ckpt.engine.find import Found, fit_states
from mpi_ckpt.engine.incoming import adopt, match
from mpi_ckpt.engine.send import send_leaves
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.leaf import Leaf, MemoryBuffer
from mpi_ckpt.reports import RestoreReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.engine.incoming import Incoming
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.memory import Held, Memory
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.state import State

__all__ = ["recall_states"]


@without_collections
def recall_states(
    session: Session, memory: Memory, states: Sequence[State], clock: PhaseClock
) -> RestoreReport | None:
    """Restore states from the copy that root holds.

    Collective. Main thread only. A rank that holds the same copy takes its own; if one
    does not, root's leaves are sent to all.

    Args:
        session: The manager's.
        memory: Of the same kind on every rank.
        states: What to restore, the same on every rank.
        clock: Started when the restore was asked for.

    Returns:
        The report; None, with nothing changed, if root holds no copy.

    Raises:
        RestoreError: On every rank; see `CheckpointManager.restore`.
    """
    comm, held = session.comm, memory.held
    mine = held.text if held is not None and comm.is_root else b""
    text = bcast_bytes(comm, mine, "telling of a copy in memory")
    if not text:
        return None
    found = Found(json.loads(text), None)
    strict = session.options.strict
    fit = fit_states(found, states, partial=False, strict=strict)
    with clock.phase("match"):
        incoming = agree(
            comm,
            "matching a copy in memory with the program",
            lambda: match(found.description, fit.states, strict=strict),
            error=RestoreError,
        )
    with clock.phase("transfer"):
        own = held if held is not None and held.text == text else None
        _bring_back(comm, found, incoming, own, session.options.window_bytes)
    with clock.phase("adopt"):
        adopt(comm, incoming)
    return RestoreReport(
        generation=0,
        path=session.directory.root,
        step=found.description["step"],
        saved_size=found.description["size"],
        size=comm.size,
        bytes_read=0,
        seconds=clock.seconds(),
        metrics=found.description["metrics"],
        missing=fit.missing,
        unexpected=fit.unexpected,
        missing_leaves={
            one.state.name: one.arrival.missing for one in incoming if one.arrival.missing
        },
        unexpected_leaves={
            one.state.name: one.arrival.unexpected
            for one in incoming
            if one.arrival.unexpected
        },
        from_memory=True,
    )


def _bring_back(
    comm: Communicator,
    found: Found,
    incoming: Sequence[Incoming],
    own: Held | None,
    window_bytes: int,
) -> None:
    doing = "bringing back a copy in memory"
    targets = [leaf for one in incoming for leaf in one.leaves]
    sources = _pick(found, incoming, own) if own is not None else []

    def copy() -> None:
        for source, target in zip(sources, targets, strict=own is not None):
            target.buffer.write(source)

    agree(comm, doing, copy, error=RestoreError)
    (lacking,) = any_of(comm, doing, own is None)
    if lacking:
        # Root's own are sent from the copy, as a leaf that root has no use for is nowhere
        # else.
        held = [
            Leaf(target.spec, MemoryBuffer(source))
            for source, target in zip(sources, targets, strict=own is not None)
        ]
        send_leaves(comm, held if comm.is_root else targets, window_bytes)


def _pick(found: Found, incoming: Sequence[Incoming], own: Held) -> list[memoryview]:
    """Return the bytes of the states that come back, in their order."""
    data = iter(own.data)
    by_name = {
        name: [next(data) for _ in saved["places"]]
        for name, saved in found.description["states"].items()
    }
    return [source for one in incoming for source in by_name[one.state.name]]
