# SPDX-License-Identifier: Apache-2.0
"""What torch cuts over the ranks: saved on some ranks, restored on others, bit for bit."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import pytest

from tests.jobs import PATIENCE_SECONDS, PROGRAMS, Jobs
from tests.ranks import randoms

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

EVEN = ("grid", "hsdp", "stage")
ANY = ("ddp", "fsdp", "tp", "zero")


def kinds_of(ranks: int) -> tuple[str, ...]:
    """Return the kinds of training that so many ranks can run."""
    return (*ANY, *(EVEN if ranks % 2 == 0 else ()), *(("plain",) if ranks == 1 else ()))


def run(jobs: Jobs, folder: Path, ranks: int, actions: Iterable[str]) -> None:
    job = jobs.start(ranks, PROGRAMS / "cut_training.py", folder, *actions)
    outcome = jobs.finish(job, patience=3 * PATIENCE_SECONDS)  # many trainings
    assert outcome.code == 0, outcome.text


def loads(ranks: int, kinds: Iterable[str], saved: Iterable[str]) -> list[str]:
    return [
        f"{ranks}:load:{pair}" for pair in map(":".join, zip(kinds, saved, strict=False))
    ]


def test_every_cut_returns_on_as_many_ranks_and_on_fewer(jobs: Jobs, tmp_path: Path):
    kinds = kinds_of(4)
    saved = [f"{kind}-4" for kind in kinds]
    actions = [f"4:save:{kind}" for kind in kinds]
    actions += loads(4, kinds, saved) + loads(3, ANY, saved[3:])
    # A stage has some layers of a model that other ranks had whole.
    whole = ("ddp-4", "tp-4", "zero-4")
    actions += ["1:save:plain", *loads(4, ["stage"] * 4, ("plain-1", *whole))]
    run(jobs, tmp_path, 4, actions)


@pytest.mark.long
def test_any_cut_on_any_ranks_gives_any_other(jobs: Jobs, tmp_path: Path):
    sizes = (1, 2, 3, 4, 6)
    actions = [f"{ranks}:save:{kind}" for ranks in sizes for kind in kinds_of(ranks)]
    saved = [f"{kind}-{ranks}" for ranks in sizes for kind in kinds_of(ranks)]
    random = randoms(0)
    for ranks in sizes:
        # All numbers of ranks for two kinds, the same cut for all, and drawn others.
        pairs = {f"{kind}:{kind}-{n}" for kind, n in product(("fsdp", "zero"), sizes)}
        pairs |= {f"{kind}:plain-1" for kind in ("fsdp", "zero", "ddp")}
        for kind in kinds_of(ranks):
            pairs |= {f"{kind}:{kind}-{ranks}"}
            pairs |= {f"{kind}:{name}" for name in random.sample(saved, 4)}
        actions += [f"{ranks}:load:{pair}" for pair in sorted(pairs)]
    actions += [f"1:load:plain:{kind}-3" for kind in ("fsdp", "zero", "ddp")]
    run(jobs, tmp_path, 6, actions)
