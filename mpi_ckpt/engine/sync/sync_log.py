# SPDX-License-Identifier: Apache-2.0
"""Logs which live values a sync has changed: none is overwritten without a log line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mpi_ckpt.state import LeafState, PartsState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.reports import SyncReport
    from mpi_ckpt.state import State

logger = logging.getLogger(__name__)

_NAMES_MAX = 12


class SyncLog:
    """Logs what saves have made equal: by name at first, then in numbers.

    Not collective. Called on root only. The running statistics of batch normalization
    differ at every save of a data-parallel training: one log line about them is useful, a
    line at every save is not.
    """

    def __init__(self) -> None:
        self._named_states: set[str] = set()

    def log_save(self, report: SyncReport, states: Sequence[State], step: int) -> None:
        """Log what the sync before a save has changed, and name each state once.

        Args:
            report: Report of the sync.
            states: The synced states.
            step: The training step of the save.
        """
        # States in parts differ until root has joined the parts.
        parts = {state.name for state in states if isinstance(state, PartsState)}
        differing = {k: leaves for k, leaves in report.differing.items() if k not in parts}
        if not differing:
            return
        modes = _modes(states)
        for name, leaves in differing.items():
            if name not in self._named_states:
                self._named_states.add(name)
                logger.warning(
                    "state %r differed between ranks at step %d, and the save has made it "
                    "equal: all ranks now have %s of %s. Later saves report numbers only "
                    "(INFO, and SaveReport.sync)",
                    *(name, step, _source(modes[name]), listed(leaves)),
                )
        logger.info(
            "step %d: %s differed between ranks, and were made equal",
            *(step, _counted(differing)),
        )


def log_sync(report: SyncReport, states: Sequence[State]) -> None:
    """Log what an explicit sync has changed.

    Not collective. Called on root only. A warning for a state that compares its replicas,
    which should not differ; else a line of INFO.

    Args:
        report: Report of the sync.
        states: The synced states.
    """
    modes = _modes(states)
    for name, leaves in report.differing.items():
        level = logging.WARNING if modes[name] == "check" else logging.INFO
        logger.log(
            level,
            "sync(): state %r differed between ranks: all now have %s of %s",
            *(name, _source(modes[name]), listed(leaves)),
        )


def _modes(states: Sequence[State]) -> dict[str, str]:
    return {state.name: state.sync_mode for state in states if isinstance(state, LeafState)}


def _source(mode: str) -> str:
    if mode == "mean":
        return "the average (or root's values, where there is no average)"
    return "root's values"


def listed(leaves: Sequence[str]) -> str:
    """Return 12 names of leaves in words, and the number of the rest. Not collective."""
    more = len(leaves) - _NAMES_MAX
    shown = ", ".join(leaves[:_NAMES_MAX]) or "nothing but its form"
    return f"{shown} and {more:,} more" if more > 0 else shown


def _counted(differing: Mapping[str, Sequence[str]]) -> str:
    leaves = sum(map(len, differing.values()))
    return f"{leaves} leaves of {len(differing)} states"
