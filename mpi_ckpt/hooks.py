# SPDX-License-Identifier: Apache-2.0
"""Defines the hooks: functions of the program that root calls after saves and restores."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi_ckpt.reports import RestoreReport, SaveReport, StopReport

__all__ = ["Hooks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Functions that root calls after saves, restores and stops; ``|`` joins two.

    Called on root only, in its main thread, so a hook must not use MPI or the manager: the
    other ranks are already training. A hook that raises is logged as a warning with its
    traceback; the training goes on, and so do the other hooks. The other ranks need no
    hooks, and those that they give are ignored.

    Attributes:
        on_save: Given the report of every acknowledged save: those of ``step()`` too, and
            asynchronous ones once the ranks have met for them.
        on_restore: Given the report of every restore that found something.
        on_stop: Given the report of a requested stop, after the last save.

    Raises:
        OptionsError: On every rank that makes it, if one is not a function.
    """

    # Ranks compare options as text, and the text of a function differs between ranks.
    on_save: Callable[[SaveReport], object] | None = field(default=None, repr=False)
    on_restore: Callable[[RestoreReport], object] | None = field(default=None, repr=False)
    on_stop: Callable[[StopReport], object] | None = field(default=None, repr=False)
    _joined: tuple[Hooks, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {value!r}, not a function"
            for name in _NAMES
            if (value := getattr(self, name)) is not None and not callable(value)
        ]
        if faults:
            raise OptionsError(
                "hooks cannot be used:\n  " + "\n  ".join(faults), problems=faults
            )

    def __or__(self, other: Hooks) -> Hooks:
        """Return hooks that call those of both, in this order."""
        joined = Hooks()
        object.__setattr__(joined, "_joined", (self, other))
        return joined

    def functions(self, name: str) -> list[Callable[[Any], object]]:
        """Return the functions for an event, in order. Not collective. Thread-safe.

        Args:
            name: ``on_save``, ``on_restore`` or ``on_stop``.
        """
        mine = getattr(self, name)
        found = [] if mine is None else [mine]
        return found + [one for hooks in self._joined for one in hooks.functions(name)]


_NAMES = [field.name for field in fields(Hooks) if field.init]
