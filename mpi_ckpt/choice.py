# SPDX-License-Identifier: Apache-2.0
"""Selects a generation: the newest, by number, by step, or the best by a metric. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import index
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import OptionsError
from mpi_ckpt.retention import best_first, best_policies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.retention import GenerationSummary, Mode, RetentionPolicy

__all__ = ["Choice"]

_BEST = {"min": "lowest", "max": "highest"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A requested generation; without any attribute the newest.

    Attributes:
        generation: Its number.
        step: The training step it was saved at; the newest if several match.
        best: The metric by which it is the best; the newest of equals.
        mode: Which value of the metric is the best.
    """

    generation: Any = None
    step: Any = None
    best: str | None = None
    mode: Mode | None = None

    @property
    def is_newest(self) -> bool:
        """Whether the newest generation is requested."""
        return self == Choice()

    def __str__(self) -> str:
        """Return the request in words, even if it is invalid."""
        asked = self._asked
        if len(asked) == 1 and self.best is None and self.mode is None:
            (text,) = asked.values()
            return text
        if asked == {"best": asked.get("best")}:
            value = _BEST.get(str(self.mode), "best")
            return f"the generation with the {value} {self.best!r}"
        return f"the generation of {', '.join(asked.values()) or 'the newest'}"

    def checked(self, retention: RetentionPolicy | None = None) -> Choice:
        """Return the request with the mode filled in from retention.

        Not collective. Thread-safe.

        Args:
            retention: Its `KeepBest` of the same metric gives the mode.

        Raises:
            OptionsError: On the calling rank, if the request is invalid.
        """
        if len(self._asked) > 1:
            raise OptionsError(
                f"{' and '.join(self._asked.values())}: give only one of these"
            )
        if self.best is None and self.mode is not None:
            raise OptionsError(
                f"mode={self.mode!r} says how to compare, but not what: give best= as well"
            )
        if self.best is not None:
            return replace(self, mode=self._mode_by(retention))
        try:
            number = None if self.generation is None else index(self.generation)
            step = None if self.step is None else index(self.step)
        except TypeError:
            name = next(iter(self._asked))
            raise OptionsError(
                f"{name}={getattr(self, name)!r}: a generation and a step must be integers"
            ) from None
        return Choice(number, step)

    def pick(self, there: Sequence[GenerationSummary]) -> int | None:
        """Return the number of the requested generation; None if there is none.

        Not collective. Thread-safe.

        Args:
            there: All generations, oldest first.
        """
        numbers = [info.generation for info in there]
        if self.best is not None and self.mode is not None:
            numbers = best_first(self.best, self.mode, there)[:1]
        elif self.step is not None:
            numbers = [info.generation for info in there if info.step == self.step]
        elif self.generation is not None:
            numbers = [number for number in numbers if number == self.generation]
        return numbers[-1] if numbers else None

    @property
    def _asked(self) -> dict[str, str]:
        texts = {
            "generation": f"generation {self.generation}",
            "step": f"the generation of step {self.step}",
            "best": f"best={self.best!r}",
        }
        return {
            name: text for name, text in texts.items() if getattr(self, name) is not None
        }

    def _mode_by(self, retention: RetentionPolicy | None) -> Mode:
        policies = [] if retention is None else best_policies(retention)
        modes = {policy.mode for policy in policies if policy.metric == self.best}
        if self.mode is None and len(modes) == 1:
            return modes.pop()
        if self.mode not in ("min", "max"):
            found = f"KeepBest with mode {' and '.join(sorted(modes))}"
            raise OptionsError(
                f"best={self.best!r}, mode={self.mode!r}: give mode='min' or mode='max'; "
                f"the retention has {found if modes else 'no KeepBest'} for that metric"
            )
        if modes and self.mode not in modes:
            raise OptionsError(
                f"best={self.best!r}, mode={self.mode!r}: the retention keeps the best by "
                f"{', '.join(map(repr, policies))}; leave mode= out"
            )
        return self.mode
