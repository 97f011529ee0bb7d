# SPDX-License-Identifier: Apache-2.0
"""Joins what each rank says of itself at its first meeting, up a tree of ranks. Pure.

Neighbouring ranks mostly say the same, since a launcher fills one host after another. So a
roster has an entry for each run of equal ranks, and grows with the hosts, not the ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

TEXTS_MAX = 17
"""How many findings travel as text; of more only the ranks are told."""


@dataclass(frozen=True, slots=True)
class RankTexts:
    """A text of each rank.

    Attributes:
        texts: The different texts, in the order of the first rank that has each.
        runs: Pairs of the index of a text and a number of neighbouring ranks that have it.
    """

    texts: tuple[str, ...]
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, runs: Iterable[tuple[str, int]]) -> RankTexts:
        """Return the texts of neighbouring runs, each a text and a number of ranks."""
        index: dict[str, int] = {}
        numbered = [(index.setdefault(text, len(index)), ranks) for text, ranks in runs]
        joined = groupby(numbered, key=lambda run: run[0])
        return cls(
            tuple(index),
            tuple((text, sum(ranks for _, ranks in same)) for text, same in joined),
        )

    def each_run(self) -> Iterable[tuple[str, int]]:
        """Return the runs: a text, and the number of ranks that have it."""
        return ((self.texts[text], ranks) for text, ranks in self.runs)

    @property
    def index_of(self) -> NDArray[np.int32]:
        """The index of each rank's text, shape (ranks,)."""
        runs = np.array(self.runs, np.int32).reshape(-1, 2)
        return np.repeat(runs[:, 0], runs[:, 1])


@dataclass(frozen=True, slots=True)
class Roster:
    """What neighbouring ranks say of themselves.

    Attributes:
        hosts: The host name of each.
        objections: The reason of each to refuse the job; empty for none.
    """

    hosts: RankTexts
    objections: RankTexts

    @classmethod
    def own(cls, host: str, objection: str) -> Roster:
        """Return the roster of one rank."""
        return cls(RankTexts.of([(host, 1)]), RankTexts.of([(objection, 1)]))

    @classmethod
    def join(cls, rosters: Iterable[Roster]) -> Roster:
        """Return the roster of all ranks of some rosters, in order."""
        each = list(rosters)
        return cls(
            *(
                RankTexts.of(
                    chain.from_iterable(getattr(r, column).each_run() for r in each)
                )
                for column in ("hosts", "objections")
            )
        )

    def encode(self) -> bytes:
        """Return the roster as bytes."""
        columns = [[column.texts, column.runs] for column in (self.hosts, self.objections)]
        return json.dumps(columns, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, encoded: bytes) -> Roster:
        """Return the roster that `encode` encoded."""
        columns = (
            RankTexts(tuple(texts), tuple((text, ranks) for text, ranks in runs))
            for texts, runs in json.loads(encoded)
        )
        return cls(*columns)


@dataclass(frozen=True, slots=True)
class Findings:
    """What neighbouring ranks have found.

    Attributes:
        keys: Of each rank's finding; empty for none.
        texts: Key -> the finding of the lowest rank with it, of the first `TEXTS_MAX` keys.
    """

    keys: RankTexts
    texts: Mapping[str, str]

    @classmethod
    def own(cls, key: str, text: str) -> Findings:
        """Return the finding of one rank."""
        return cls(RankTexts.of([(key, 1)]), {key: text} if key else {})

    @classmethod
    def join(cls, findings: Sequence[Findings]) -> Findings:
        """Return the findings of all ranks of some, in order."""
        keys = RankTexts.of(chain.from_iterable(one.keys.each_run() for one in findings))
        # Reversed: of each key the first text stays. A key that is among the first ones of
        # all is among the first ones of its neighbours, so its text is here.
        texts = {key: text for one in reversed(findings) for key, text in one.texts.items()}
        first = [key for key in keys.texts if key][:TEXTS_MAX]
        return cls(keys, {key: texts[key] for key in first})

    def by_text(self) -> list[tuple[str, list[int]]]:
        """Return each finding and its ranks, in the order of the lowest ranks."""
        index_of = self.keys.index_of
        by_key = np.argsort(index_of, kind="stable")
        ends = np.cumsum(np.bincount(index_of, minlength=len(self.keys.texts)))
        ranks = np.split(by_key, ends[:-1])
        return [
            (self.texts.get(key, ""), ranks[index].tolist())
            for index, key in enumerate(self.keys.texts)
            if key
        ]

    def encode(self) -> bytes:
        """Return the findings as bytes."""
        values = [self.keys.texts, self.keys.runs, self.texts]
        return json.dumps(values, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, encoded: bytes) -> Findings:
        """Return the findings that `encode` encoded."""
        keys, runs, texts = json.loads(encoded)
        return cls(RankTexts(tuple(keys), tuple((key, n) for key, n in runs)), texts)


def parent_of(rank: int) -> int | None:
    """Return the rank to which a rank sends its roster; None for rank 0, the root."""
    return rank & (rank - 1) if rank else None


def children_of(rank: int, size: int) -> list[int]:
    """Return the ranks that send a rank their rosters, ascending.

    The tree is binomial: the roster of a child covers it and the ranks up to the next
    child, so rosters joined in this order are in the order of the ranks.
    """
    lowest = rank & -rank if rank else 1 << (size - 1).bit_length()
    steps = (1 << power for power in range(lowest.bit_length()) if 1 << power < lowest)
    return [rank + step for step in steps if rank + step < size]


def branch_of(rank: int, size: int) -> range:
    """Return a rank and all ranks that send it their rosters, directly or not."""
    return range(rank, min(rank + (rank & -rank), size) if rank else size)
