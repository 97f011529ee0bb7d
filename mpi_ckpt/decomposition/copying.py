# SPDX-License-Identifier: Apache-2.0
"""Copies fragments between pieces, messages and wanted tiles. Pure: no MPI, no file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.decomposition.regions import elements_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from mpi_ckpt.decomposition.rank_plan import RankPlan, Transfer, Turn

    Memory = Callable[[int], memoryview]


def pack(
    plan: RankPlan, transfer: Transfer, piece: Memory, message: NDArray[np.uint8]
) -> None:
    """Fill a message with its fragments. Not collective. Thread-safe.

    Args:
        plan: The sender's plan.
        transfer: The message.
        piece: Returns the bytes of a piece, by its row in the plan.
        message: Memory for the message's bytes, (n,).
    """
    position = 0
    for row in transfer.fragments:
        unit = int(plan.sends.unit[row])
        elements = elements_of(piece(int(plan.sends.piece[row])), unit)
        view = plan.sends.source.view(row, elements)
        end = position + view.size * unit
        elements_of(message[position:end], unit).reshape(view.shape)[...] = view
        position = end


def unpack(
    plan: RankPlan, transfer: Transfer, message: NDArray[np.uint8], target: Memory
) -> None:
    """Put the fragments of a message where they belong. Not collective. Thread-safe.

    Args:
        plan: The receiver's plan.
        transfer: The message.
        message: Its bytes, (n,).
        target: Returns the memory of a wanted tile, by its number: one run of bytes.
    """
    position = 0
    for row in transfer.fragments:
        unit = int(plan.receives.unit[row])
        elements = elements_of(target(int(plan.receives.target[row])), unit)
        view = plan.receives.goal.view(row, elements)
        end = position + view.size * unit
        view[...] = elements_of(message[position:end], unit).reshape(view.shape)
        position = end


def keep(plan: RankPlan, turn: Turn, piece: Memory, target: Memory) -> None:
    """Copy the fragments that a rank reads for itself. Not collective. Thread-safe.

    Args:
        plan: The rank's plan.
        turn: The turn.
        piece: As for `pack`.
        target: As for `unpack`.
    """
    kept = plan.kept
    for row in turn.kept:
        unit = int(kept.unit[row])
        source = elements_of(piece(int(kept.piece[row])), unit)
        goal = elements_of(target(int(kept.target[row])), unit)
        kept.goal.view(row, goal)[...] = kept.source.view(row, source)
