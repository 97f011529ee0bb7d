# SPDX-License-Identifier: Apache-2.0
"""What asks a job to save and stop, besides signals: a plain value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["StopWhen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWhen:
    """What asks a job to save and stop, besides signals. Root's view decides.

    Attributes:
        wall_time: Whether the end of the job is looked up in the environment, where its
            scheduler tells it, and the last save comes in time for it. Default: yes.
        margin_seconds: How much earlier than it has to, by the saves measured so far.
            Default: 30.
        halt_file: Name of a file whose presence asks to stop, in the directory of the
            generations unless it is absolute. It is left where it is. Default:
            ``"halt"``; None for none.
        asked: Called on root between steps, at most once a second. What it returns asks
            to stop (True) or not (False or None), or is the number of seconds until the
            job ends. It must not use MPI. Default: none.

    Raises:
        OptionsError: On every rank that makes it, if a value cannot be used.
    """

    wall_time: bool = True
    margin_seconds: float = 30.0
    halt_file: str | None = "halt"
    # Functions have no text that is the same on every rank, by which ranks compare.
    asked: Callable[[], bool | float | None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        faults = []
        if not self.margin_seconds >= 0:
            faults.append(f"margin_seconds is {self.margin_seconds}: at least 0")
        if self.halt_file == "":
            faults.append("halt_file is empty: a name, or None for no file")
        if faults:
            raise OptionsError(
                "it cannot be told when to stop:\n  " + "\n  ".join(faults),
                problems=faults,
            )
