# SPDX-License-Identifier: Apache-2.0
"""Shows by what, and in which order, each rule of a prune ranks generations. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpi_ckpt.retention import KeepBest, KeepEvery, KeepLast, best_first

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mpi_ckpt.retention import GenerationSummary, RetentionPolicy

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Ranking:
    """How one rule orders the generations.

    Attributes:
        rule: Name of the rule's class.
        by: What it compares: ``generation``, ``step``, or ``metric`` and its name.
        direction: Which values come first.
        keeps: What it keeps of that order, in words.
        order: Number and value of each generation, in that order.
        kept: Numbers of those that the rule keeps.
        unranked: Numbers of those without a value.
    """

    rule: str
    by: str
    direction: str
    keeps: str
    order: tuple[tuple[int, float], ...]
    kept: tuple[int, ...]
    unranked: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the ranking as JSON values."""
        return {
            "rule": self.rule,
            "by": self.by,
            "direction": self.direction,
            "order": [{"generation": n, "value": value} for n, value in self.order],
            "kept": list(self.kept),
            "unranked": list(self.unranked),
        }

    def lines(self) -> list[str]:
        """Return the ranking for users: its criterion, and the order with values."""
        head = f"{self.rule}: by {self.by}, {self.direction} first; keeps {self.keeps}"
        plain = self.by == "generation"
        words = [f"{n}" if plain else f"{n} ({_number(value)})" for n, value in self.order]
        text = ", ".join(words[:_SHOWN])
        if len(words) > _SHOWN:
            text += f" and {len(words) - _SHOWN} more"
        lines = [head, f"  in that order: {text or 'none'}"]
        if self.unranked:
            lines.append(f"  without a value: {', '.join(map(str, self.unranked))}")
        return lines


def rank(
    policies: Sequence[RetentionPolicy], generations: Collection[GenerationSummary]
) -> list[Ranking]:
    """Return how each of some rules orders the generations."""
    ordered = sorted(generations, key=lambda summary: summary.generation)
    return [_rank(policy, ordered) for policy in policies]


def _rank(policy: RetentionPolicy, ordered: Sequence[GenerationSummary]) -> Ranking:
    kept = policy.keep(ordered)
    if isinstance(policy, KeepBest):
        best = best_first(policy.metric, policy.mode, ordered)
        values = {
            summary.generation: summary.metrics.get(policy.metric, 0.0)
            for summary in ordered
        }
        low = policy.mode == "min"
        return Ranking(
            "keep-best",
            f"metric {policy.metric}",
            f"{'lowest' if low else 'highest'} (mode {policy.mode})",
            "the first" if policy.count == 1 else f"the first {policy.count}",
            tuple((number, values[number]) for number in best),
            tuple(number for number in best if number in kept),
            tuple(
                summary.generation for summary in ordered if summary.generation not in best
            ),
        )
    if isinstance(policy, KeepEvery):
        return Ranking(
            "keep-every",
            "step",
            "oldest",
            f"the first of every {policy.steps} steps",
            tuple((summary.generation, summary.step) for summary in ordered),
            tuple(summary.generation for summary in ordered if summary.generation in kept),
        )
    assert isinstance(policy, KeepLast)
    newest = [summary.generation for summary in reversed(ordered)]
    return Ranking(
        "keep-last",
        "generation",
        "newest",
        "the first" if policy.count == 1 else f"the first {policy.count}",
        tuple((number, number) for number in newest),
        tuple(number for number in newest if number in kept),
    )


def _number(value: float) -> str:
    return f"{value}" if isinstance(value, int) else f"{value:.6g}"
