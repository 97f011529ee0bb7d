# SPDX-License-Identifier: Apache-2.0
"""Implements ``mpi-ckpt verify``, which proves every byte of one generation, or of all."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from mpi_ckpt.cli.command import (
    BAD,
    GOOD,
    CommandError,
    command,
    directory_argument,
    generation_argument,
    misused,
)
from mpi_ckpt.cli.directory_kinds import directory_of_all, directory_to_look_at
from mpi_ckpt.cli.generations import find_generation, state_after
from mpi_ckpt.cli.plain_text import bytes_text, plural
from mpi_ckpt.cli.tables import Column
from mpi_ckpt.errors import CheckpointError, CorruptGenerationError
from mpi_ckpt.storage.directory import recovery
from mpi_ckpt.storage.format.layout import generation_name, generation_number
from mpi_ckpt.storage.reading.proving import proven_blocks
from mpi_ckpt.storage.reading.reader import GenerationReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mpi_ckpt.cli.screen import Screen
    from mpi_ckpt.storage.format.manifest import StoredLeaf
    from mpi_ckpt.storage.reading.read_plan import DigestBlock

_PROBLEMS_SHOWN = 20
_PROBLEMS_MAX = 1000


@dataclass(slots=True)
class _Verdict:
    """The result for one generation: ``good``, a bad state, or ``gone``."""

    path: Path
    state: str = "good"
    problems: list[tuple[str, str]] = field(default_factory=list)
    step: int | None = None
    nbytes: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "generation": generation_number(self.path.name),
            "step": self.step,
            "state": self.state,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "problems": [{"leaf": leaf or None, "message": m} for leaf, m in self.problems],
        }


@command("verify", "Prove every byte of a generation.")
@directory_argument()
@generation_argument()
@click.option("--all", "everything", is_flag=True, help="Prove all, newest first.")
def verify(
    screen: Screen, directory: Path, generation: str | None, everything: bool
) -> int:
    """Prove every byte of a generation against its digests.

    Without GENERATION it is the newest. Reads around the page cache where that is
    possible, so that it is the disk that is proven. Exit code 0: all good; 1: some bad.
    """
    if everything:
        directory = directory_of_all(directory, "verify --all")
    else:
        directory = directory_to_look_at(directory, generation, "verify")
    if everything and generation is not None:
        raise misused("give a generation or --all, not both")
    verdicts = _verify_chosen(screen, directory, generation, everything=everything)
    bad = [verdict for verdict in verdicts if verdict.state not in ("good", "gone")]
    screen.data(
        {"good": not bad, "generations": [verdict.to_json() for verdict in verdicts]}
    )
    _show(screen, verdicts)
    if bad:
        screen.say(
            f"{len(bad)} of {plural(len(verdicts), 'generation')} bad; a restore goes back "
            "to the newest good one",
            style="bold red",
        )
    return BAD if bad else GOOD


def _verify_chosen(
    screen: Screen, directory: Path, generation: str | None, *, everything: bool
) -> list[_Verdict]:
    before: list[Path] = []
    while True:
        paths = _chosen(directory, generation, everything=everything)
        verdicts = [
            _verify(screen, path, f"{place} of {len(paths)}, {path.name}")
            for place, path in enumerate(paths, 1)
        ]
        if any(verdict.state != "gone" for verdict in verdicts):
            return verdicts
        # A generation pruned meanwhile is no finding: a newer one exists then.
        if generation not in (None, "newest") or paths == before:
            raise CommandError(f"{paths[0]} is gone: a job has pruned it", kind="gone")
        before = paths


def _chosen(directory: Path, generation: str | None, *, everything: bool) -> list[Path]:
    there = recovery.survey(directory).generations
    if everything and there:
        return [directory / generation_name(number) for number in there]
    if generation in (None, "newest") and there:
        # Not the newest that opens: a newer one that does not open is a finding.
        return [directory / generation_name(there[0])]
    return [find_generation(directory, generation)]


def _verify(screen: Screen, path: Path, doing: str) -> _Verdict:
    verdict = _Verdict(path)
    start = time.perf_counter()
    try:
        with GenerationReader(path) as reader:
            verdict.step = reader.manifest.step
            total = reader.manifest.nbytes

            def count(nbytes: int) -> None:
                verdict.nbytes += nbytes
                done(nbytes)

            done: Callable[[int], None]
            with screen.progress(doing, total) as done:
                found = find_problems(reader, count)
        for leaf, error in found:
            verdict.state = _worse(verdict.state, error)
            verdict.problems.append((leaf, str(error)))
    except CheckpointError as error:
        verdict.state = state_after(path, error)
        if verdict.state != "gone":
            verdict.problems.append(("", str(error)))
    verdict.seconds = time.perf_counter() - start
    return verdict


def find_problems(
    reader: GenerationReader, done: Callable[[int], None]
) -> list[tuple[str, CheckpointError]]:
    """Read a whole generation and return its faults.

    Args:
        reader: The open generation.
        done: Called with the number of bytes read.

    Returns:
        Name of the leaf (of a tile also its box) and the error, for each wrong block, in
        reading order; ends at a file that cannot be read to its end.
    """
    problems: list[tuple[str, CheckpointError]] = []
    named = _named_leaves(reader, problems)

    def refuse(block: DigestBlock, problem: CorruptGenerationError) -> None:
        problems.append((named[block.leaf][0], problem))

    blocks = proven_blocks(reader, [leaf for _, leaf in named], refuse=refuse)
    try:
        with closing(blocks):
            for _, data in blocks:
                done(len(data))
                if len(problems) >= _PROBLEMS_MAX:
                    break
    except CheckpointError as error:
        problems.append(("", error))
    return problems[:_PROBLEMS_MAX]


def _named_leaves(
    reader: GenerationReader, problems: list[tuple[str, CheckpointError]]
) -> list[tuple[str, StoredLeaf]]:
    """Return the leaves and tiles here, with names; note tables that cannot be used."""
    named = [
        (state.name if state.is_stream else f"{state.name}/{leaf.spec.name}", leaf)
        for state in reader.manifest.states
        for leaf in state.leaves
        if leaf.extent.file not in reader.absent
    ]
    try:
        tiles = reader.tiles()
    except CheckpointError as error:
        problems.append(("", error))
        return named
    for (state, leaf), found in tiles.items():
        named += [(f"{state}/{leaf} {tile.box}", tile.leaf) for tile in found]
    return named


def _worse(state: str, error: CheckpointError) -> str:
    if isinstance(error, CorruptGenerationError):
        return "damaged"
    return "unreadable" if state == "good" else state


def _show(screen: Screen, verdicts: list[_Verdict]) -> None:
    screen.table(
        [
            Column("generation", names=True),
            Column("step", right=True, spare=1),
            Column("proven", right=True, spare=2),
            Column("time", right=True, spare=3),
            Column("rate", right=True, spare=4),
            Column("state", states=True),
        ],
        [
            [
                generation_number(verdict.path.name) or verdict.path.name,
                "" if verdict.step is None else verdict.step,
                bytes_text(verdict.nbytes),
                f"{verdict.seconds:.2f} s",
                f"{bytes_text(int(verdict.nbytes / max(verdict.seconds, 1e-9)))}/s",
                verdict.state,
            ]
            for verdict in verdicts
        ],
    )
    for verdict in verdicts:
        for leaf, message in verdict.problems[:_PROBLEMS_SHOWN]:
            screen.say(f"{leaf}: {message}" if leaf else message, style="red")
        hidden = len(verdict.problems) - _PROBLEMS_SHOWN
        if hidden > 0:
            screen.say(f"... and {plural(hidden, 'problem')} more (--json has them)")
