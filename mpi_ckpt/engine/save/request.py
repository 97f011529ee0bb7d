# SPDX-License-Identifier: Apache-2.0
"""Defines the request and the result of a save: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpi_ckpt.engine.sync.captured import CapturedState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mpi_ckpt.engine.sync.parts import OwnParts
    from mpi_ckpt.state import State


@dataclass(frozen=True, slots=True)
class Begun:
    """The states that all ranks have agreed to save.

    Attributes:
        states: The same states in the same order on every rank.
        parts: This rank's parts; None if they are to be taken after the plain states have
            synced.
    """

    states: Sequence[State]
    parts: OwnParts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """The contents of a save.

    Attributes:
        states: Captured leaf states, and plain states to be streamed, in order.
        step: The training step.
        metrics: The user's metrics.
        size: Number of ranks.
        carry: Decides by name which other states of the newest generation to carry over;
            None for none.
    """

    states: Sequence[CapturedState | State]
    step: int
    size: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    carry: Callable[[str], bool] | None = None

    @property
    def captured(self) -> list[CapturedState]:
        """The leaf states."""
        return [state for state in self.states if isinstance(state, CapturedState)]

    @property
    def plain(self) -> list[State]:
        """The states that write themselves."""
        return [state for state in self.states if not isinstance(state, CapturedState)]


@dataclass(frozen=True, slots=True)
class Published:
    """A generation that exists and is durable.

    Attributes:
        generation: Its number.
        path: Its directory.
        bytes_written: Bytes written for it, by all ranks.
        bytes_reused: Bytes of the leaves that it shares with older generations.
        retired: Older generations that retention no longer keeps.
    """

    generation: int
    path: Path
    bytes_written: int
    bytes_reused: int
    retired: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the values that root sends to every rank. Not collective. Thread-safe."""
        return {
            "generation": self.generation,
            "path": str(self.path),
            "bytes_written": self.bytes_written,
            "bytes_reused": self.bytes_reused,
            "pruned": self.retired,
        }
