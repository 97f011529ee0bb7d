# SPDX-License-Identifier: Apache-2.0
"""Holds up whoever is about to change tensors until they are copied."""

from __future__ import annotations

from concurrent.futures import wait
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["Gate"]


class Gate:
    """Stands between a copy behind the training's back and the next change.

    Main thread only. A future ends whether the copy succeeds or fails, so nobody is held
    up for ever.
    """

    def __init__(self) -> None:
        self._copy: Future[None] | None = None

    def hold(self, copy: Future[None]) -> None:
        """Let `wait` wait for a copy."""
        self._copy = copy

    def wait(self) -> None:
        """Return when what is behind the gate may change; its error is not raised here."""
        copy, self._copy = self._copy, None
        if copy is not None:
            wait([copy])
