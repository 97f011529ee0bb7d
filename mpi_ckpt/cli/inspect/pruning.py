# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt prune``, which removes generations as a job's retention does."""

from __future__ import annotations

import operator
import secrets
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import click

from mpi_ckpt.cli.command import (
    BAD,
    GOOD,
    command,
    directory_argument,
    lock_directory,
    misused,
    mode_option,
)
from mpi_ckpt.cli.directory_kinds import directory_of_all
from mpi_ckpt.cli.generations import bytes_freed, look
from mpi_ckpt.cli.inspect.ranking import rank
from mpi_ckpt.cli.inspect.verifying import find_problems
from mpi_ckpt.cli.plain_text import bytes_text, listed, plural
from mpi_ckpt.retention import (
    GenerationSummary,
    KeepBest,
    KeepEvery,
    KeepLast,
    metric_names,
    select_kept,
    unmet_policies,
)
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.directory.catalog import Catalog
from mpi_ckpt.storage.directory.pins import bring_back_pinned
from mpi_ckpt.storage.format.layout import generation_name
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from pathlib import Path

    from mpi_ckpt.cli.generations import Row
    from mpi_ckpt.cli.inspect.ranking import Ranking
    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.retention import Mode, RetentionPolicy


@dataclass(frozen=True, slots=True)
class _PrunePlan:
    """The generations to remove, keep and leave alone; rankings; pins; what there is."""

    removed: tuple[int, ...]
    kept: tuple[int, ...]
    left_alone: tuple[str, ...]
    rankings: list[Ranking]
    pinned: tuple[int, ...]
    rows: list[Row]

    @property
    def freed(self) -> int:
        """Bytes that the removal frees."""
        gone = {generation_name(number) for number in self.removed}
        return bytes_freed([row for row in self.rows if row.name in gone], self.rows)


@command("prune", "Remove all generations but those that the options keep.")
@directory_argument()
@click.option(
    "--keep-last",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the N newest generations.",
)
@click.option(
    "--keep-every",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Keep the first generation of every STEPS steps.",
)
@click.option(
    "--keep-best",
    metavar="METRIC",
    help="Keep the generation with the best value of METRIC.",
)
@mode_option()
@click.option(
    "--verify",
    is_flag=True,
    help="First prove the generations that stay; bad ones do not count.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed, and why.")
def prune(
    screen: Screen,
    directory: Path,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: str | None,
    mode: Mode | None,
    verify: bool,
    dry_run: bool,
) -> int:
    """Remove generations that no --keep option keeps.

    The newest good one and pinned ones stay; damaged ones are left alone: quarantine those.
    Damage inside of files is seen with --verify only. Before anything goes it says what
    each rule ranks by, which way, and with which values. Refused while a job uses DIR.
    Leftovers of writes that were cut off go as well.
    """
    # Leave not even a lock file in a directory that holds no checkpoints.
    directory = directory_of_all(directory, "prune")
    policies = _policies(keep_last, keep_every, keep_best, mode)
    job = secrets.token_hex(6)
    with nullcontext() if dry_run else closing(lock_directory(directory, job)):
        plan = _plan(screen, directory, policies, verify=verify)
        _say_ranking(screen, plan)
        leftovers = recovery.survey(directory).partials
        if not dry_run:
            leftovers = bring_back_pinned(directory, leftovers)
            recovery.sweep(directory, leftovers, job)
            Catalog(directory).remove(plan.removed, job)
    # Failed removals were logged; those generations still exist under some name.
    stayed = set(plan.removed) & set(recovery.survey(directory).generations)
    failed = sorted(stayed) if not dry_run else []
    plan = replace(plan, removed=tuple(n for n in plan.removed if n not in failed))
    screen.data(
        {
            "dry_run": dry_run,
            "ranked_by": [ranking.to_json() for ranking in plan.rankings],
            "removed": list(plan.removed),
            "kept": list(plan.kept),
            "pinned": list(plan.pinned),
            "left_alone": list(plan.left_alone),
            "leftovers": list(leftovers),
            "failed": failed,
            "bytes_freed": plan.freed,
        }
    )
    _show(screen, plan, leftovers, dry_run=dry_run)
    if failed:
        screen.say(f"could not be removed: {listed(failed)}", style="bold red")
    return BAD if failed else GOOD


def _policies(
    last: int | None, every: int | None, best: str | None, mode: Mode | None
) -> list[RetentionPolicy]:
    policies: list[RetentionPolicy] = []
    if last is not None:
        policies.append(KeepLast(last))
    if every is not None:
        policies.append(KeepEvery(every))
    if best is not None:
        if mode is None:
            raise misused(
                f"--keep-best {best}: which value is best? give --mode min or --mode max"
            )
        policies.append(KeepBest(best, mode=mode))
    elif mode is not None:
        raise misused(f"--mode {mode}: of which metric? give --keep-best METRIC as well")
    if not policies:
        raise misused(
            "give what to keep: --keep-last N, --keep-every STEPS or --keep-best METRIC; a "
            "generation stays if any of them keeps it"
        )
    return policies


def _plan(
    screen: Screen, directory: Path, policies: list[RetentionPolicy], *, verify: bool
) -> _PrunePlan:
    policy = reduce(operator.or_, policies)
    everything = look(directory)
    rows = [row for row in everything if row.name.startswith("checkpoint-")]
    # A damaged generation must not count as kept: good ones would be removed instead.
    good = {
        row.manifest.generation: row
        for row in rows
        if row.manifest is not None and row.state in ("newest", "ok")
    }
    pinned = recovery.survey(directory).pinned & set(good)
    kept = _kept(policy, good) | pinned
    proven: set[int] = set()
    while verify and kept - proven:
        number = max(kept - proven)
        proven.add(number)
        if not _proves(screen, directory / good[number].name):
            del good[number]
            kept = _kept(policy, good) | (pinned & set(good))
    sound = {row.name for row in good.values()}
    return _PrunePlan(
        removed=tuple(number for number in good if number not in kept),
        kept=tuple(number for number in good if number in kept),
        rankings=rank(policies, _summaries(good)),
        left_alone=tuple(row.name for row in rows if row.name not in sound),
        pinned=tuple(sorted(pinned & set(good))),
        rows=everything,
    )


def _kept(policy: RetentionPolicy, good: dict[int, Row]) -> set[int]:
    there = _summaries(good)
    # A misspelled name would remove all that it was meant to keep.
    for unmet in unmet_policies(policy, there) if there else ():
        raise misused(
            f"--keep-best {unmet.metric} --mode {unmet.mode}: no generation has that "
            f"metric; there: {', '.join(metric_names(there)) or 'none'}. "
            "Nothing was removed",
            "absent",
        )
    return select_kept(policy, there)


def _summaries(good: dict[int, Row]) -> list[GenerationSummary]:
    manifests = [row.manifest for row in good.values() if row.manifest is not None]
    return [GenerationSummary(m.generation, m.step, m.metrics) for m in manifests]


def _say_ranking(screen: Screen, plan: _PrunePlan) -> None:
    for ranking in plan.rankings:
        for line in ranking.lines():
            screen.say(line)
    kept = {number for ranking in plan.rankings for number in ranking.kept}
    if plan.pinned:
        screen.say(f"also kept, as pinned: {listed(plan.pinned)}")
        kept.update(plan.pinned)
    besides = [number for number in plan.kept if number not in kept]
    if besides:
        screen.say(f"also kept, as the newest good generation: {listed(besides)}")


def _proves(screen: Screen, path: Path) -> bool:
    with GenerationReader(path) as reader:
        total = reader.manifest.nbytes
        with screen.progress(path.name, total) as done:
            return not find_problems(reader, done)


def _show(
    screen: Screen, plan: _PrunePlan, leftovers: tuple[str, ...], *, dry_run: bool
) -> None:
    verb, freeing = ("would go", "would free") if dry_run else ("removed", "freed")
    screen.say(f"{verb}: {listed(plan.removed)}")
    screen.say(f"kept: {listed(plan.kept)}")
    if plan.left_alone:
        screen.say(f"left alone, not good: {', '.join(plan.left_alone)}", style="yellow")
    if leftovers:
        screen.say(f"{verb}, cut off: {', '.join(leftovers)}")
    count = plural(len(plan.removed), "generation")
    screen.say(f"{count}, {freeing} {bytes_text(plan.freed)}", style="dim")
