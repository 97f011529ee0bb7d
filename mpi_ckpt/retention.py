# SPDX-License-Identifier: Apache-2.0
"""Decides which generations stay, by pure functions; storage removes the rest.

``|`` joins policies: a generation stays if any of them keeps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from mpi_ckpt.errors import OptionsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "GenerationSummary",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "Mode",
    "RetentionPolicy",
    "best_first",
    "best_policies",
    "metric_names",
    "select_kept",
    "unmet_policies",
]

Mode = Literal["min", "max"]
"""Which value of a metric is the best."""


@dataclass(frozen=True, slots=True)
class GenerationSummary:
    """What a policy knows of a generation.

    Attributes:
        generation: Its number.
        step: The training step given at the save.
        metrics: The metrics given at the save.
    """

    generation: int
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class RetentionPolicy:
    """Decides which generations stay. Subclasses override `keep`."""

    def keep(self, generations: Sequence[GenerationSummary]) -> set[int]:
        """Return the numbers to keep.

        Not collective. Thread-safe. Called by root alone, after a save was acknowledged.

        Args:
            generations: All generations, oldest first.
        """
        raise NotImplementedError

    def __or__(self, other: RetentionPolicy) -> RetentionPolicy:
        """Keep what either of two policies keeps."""
        if not isinstance(other, RetentionPolicy):
            raise OptionsError(f"{self!r} | {other!r}: join policies, such as KeepLast(3)")
        return _Either(self, other)


@dataclass(frozen=True, slots=True)
class KeepLast(RetentionPolicy):
    """Keep the ``count`` newest generations.

    Raises:
        OptionsError: On every rank that makes it, if ``count`` is below 1.
    """

    count: int = 3

    def __post_init__(self) -> None:
        _require_count(self.count, f"KeepLast({self.count!r}): how many stay")

    def keep(self, generations: Sequence[GenerationSummary]) -> set[int]:
        """Return the newest. Not collective. Thread-safe."""
        return {summary.generation for summary in generations[-self.count :]}


@dataclass(frozen=True, slots=True)
class KeepEvery(RetentionPolicy):
    """Keep the first generation of every ``steps`` training steps, for good.

    Raises:
        OptionsError: On every rank that makes it, if ``steps`` is below 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _require_count(self.steps, f"KeepEvery({self.steps!r}): the steps")

    def keep(self, generations: Sequence[GenerationSummary]) -> set[int]:
        """Return the first of each interval. Not collective. Thread-safe."""
        first: dict[int, int] = {}
        for summary in generations:
            first.setdefault(summary.step // self.steps, summary.generation)
        return set(first.values())


@dataclass(frozen=True, slots=True)
class KeepBest(RetentionPolicy):
    """Keep the ``count`` generations with the best value of a metric.

    Generations saved without that metric, or with NaN, are never the best. If no generation
    has the metric, a warning says so once generations are removed.

    Args:
        metric: A name in the ``metrics`` of a save.
        count: How many generations stay.
        mode: Which value is the best, ``"min"`` or ``"max"``: losses and accuracies differ,
            so there is no default.

    Raises:
        OptionsError: On every rank that makes it, if ``count`` is below 1 or ``mode``
            is unknown.
    """

    metric: str
    count: int = 1
    mode: Mode = field(kw_only=True)

    def __post_init__(self) -> None:
        _require(
            isinstance(self.metric, str),
            f"{self}: the metric is its name in save(metrics={{...}})",
        )
        _require(self.mode in ("min", "max"), f"{self}: mode is 'min' or 'max'")
        _require_count(self.count, f"{self}: how many stay")

    def keep(self, generations: Sequence[GenerationSummary]) -> set[int]:
        """Return the best. Not collective. Thread-safe."""
        return set(best_first(self.metric, self.mode, generations)[: self.count])


@dataclass(frozen=True, slots=True)
class _Either(RetentionPolicy):
    left: RetentionPolicy
    right: RetentionPolicy

    def keep(self, generations: Sequence[GenerationSummary]) -> set[int]:
        return self.left.keep(generations) | self.right.keep(generations)


def best_first(
    metric: str, mode: Mode, generations: Sequence[GenerationSummary]
) -> list[int]:
    """Return the numbers of generations with a metric, best first; of equals the newest.

    Not collective. Thread-safe.

    Args:
        metric: Its name; a NaN counts as no value.
        mode: Which value is the best.
        generations: The generations to sort, in any order.
    """
    sign = 1.0 if mode == "min" else -1.0
    ranked = sorted(
        (sign * summary.metrics[metric], -summary.generation)
        for summary in generations
        if not math.isnan(summary.metrics.get(metric, math.nan))
    )
    return [-number for _, number in ranked]


def unmet_policies(
    policy: RetentionPolicy, generations: Sequence[GenerationSummary]
) -> list[KeepBest]:
    """Return every `KeepBest` of a policy whose metric no generation has.

    Not collective. Thread-safe.
    """
    return [
        best
        for best in best_policies(policy)
        if not best_first(best.metric, best.mode, generations)
    ]


def metric_names(generations: Sequence[GenerationSummary]) -> list[str]:
    """Return the metrics that generations have, sorted. Not collective. Thread-safe."""
    return sorted({name for summary in generations for name in summary.metrics})


def best_policies(policy: RetentionPolicy) -> list[KeepBest]:
    """Return every `KeepBest` in a joined policy. Not collective. Thread-safe."""
    if isinstance(policy, _Either):
        return [*best_policies(policy.left), *best_policies(policy.right)]
    return [policy] if isinstance(policy, KeepBest) else []


def select_kept(
    policy: RetentionPolicy, generations: Sequence[GenerationSummary]
) -> set[int]:
    """Apply a policy; whatever it says, the newest generation stays.

    Not collective. Thread-safe.

    Args:
        policy: The user's policy.
        generations: All generations, in any order.
    """
    ordered = sorted(generations, key=lambda summary: summary.generation)
    newest = {summary.generation for summary in ordered[-1:]}
    return policy.keep(ordered) | newest


def _require_count(count: int, what: str, kind: type = Integral) -> None:
    holds = isinstance(count, kind) and count >= 1
    _require(holds, f"{what} is a whole number, at least 1")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise OptionsError(message)
