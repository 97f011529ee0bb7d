# SPDX-License-Identifier: Apache-2.0
"""Chooses the newest generation that the hosts, or the directory, can complete. Pure.

Whether a generation was acknowledged does not matter: it is complete by proof, if each of
its files is on some host. Numbers of generations in the directory serve as a clock: each
local generation notes the highest one at its time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.storage.local.lineage import Origin

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from mpi_ckpt.storage.local.lineage import Lineage


@dataclass(frozen=True, slots=True)
class Holding:
    """The part of one local generation that one host holds.

    Attributes:
        holder: Rank of the host's leader.
        origin: The generation.
        identity: Digest of its manifest, as hexadecimal text: the same on all its hosts.
        step: Training step of the generation.
        files: Number of files of the generation.
        held: Indices of those that this host holds.
        manifest_bytes: Size of the manifest.
    """

    holder: int
    origin: Origin
    identity: str
    step: int
    files: int
    held: tuple[int, ...]
    manifest_bytes: int = 0

    def to_json(self) -> list[Any]:
        """Return the fields as JSON values. Not collective. Thread-safe."""
        what = self.step, self.files, self.held, self.manifest_bytes
        return [self.holder, self.origin, self.identity, *what]

    @classmethod
    def from_json(cls, values: list[Any]) -> Holding:
        """Return what `to_json` encoded. Not collective. Thread-safe."""
        holder, origin, identity, step, files, held, nbytes = values
        return cls(holder, Origin(*origin), identity, step, files, tuple(held), nbytes)


@dataclass(frozen=True, slots=True)
class HeldGeneration:
    """One local generation, with all that the hosts at hand hold of it.

    Attributes:
        origin: The generation.
        step: Its training step.
        holders: For each of its files the ranks of the leaders that hold it.
        manifests: The ranks of the leaders that have its manifest.
        manifest_bytes: Size of the manifest.
        is_copied: Whether the newest generation of the directory is a copy of it.
    """

    origin: Origin
    step: int
    holders: tuple[tuple[int, ...], ...]
    manifests: tuple[int, ...]
    manifest_bytes: int = 0
    is_copied: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether each of its files is on some host."""
        return all(self.holders)


@dataclass(frozen=True, slots=True)
class LocalChoice:
    """What to restore.

    Attributes:
        chosen: The local generation; None if the directory has a newer one, or there is
            none.
        lost: Newer local generations that cannot be completed, newest first.
    """

    chosen: HeldGeneration | None = None
    lost: tuple[HeldGeneration, ...] = ()


def choose(
    holdings: Iterable[Holding],
    lineage: Lineage | None,
    *,
    newest: int,
    copied: Origin | None = None,
    rolled_back: int = 0,
) -> LocalChoice:
    """Choose between the local generations at hand and the newest one in the directory.

    Not collective. Thread-safe.

    Args:
        holdings: What each host holds.
        lineage: The runs that have saved to hosts; None if none is known.
        newest: Number of the newest good generation in the directory; 0 for none.
        copied: The local generation that this one was copied from; None if it was not.
        rolled_back: The highest number in the last rollback; 0 for none.
    """
    lost: list[HeldGeneration] = []
    point = (newest, 0) if copied is None else copied[1:]
    for held in _newest_first(gather(holdings), lineage, rolled_back):
        # The directory's generation came later: it is newer than this one and all older.
        if held.origin[1:] < point:
            break
        if held.is_whole:
            chosen = replace(held, is_copied=held.origin == copied)
            return LocalChoice(chosen, tuple(lost))
        lost.append(held)
    return LocalChoice(None, tuple(lost))


def gather(holdings: Iterable[Holding]) -> list[HeldGeneration]:
    """Join what several hosts hold of the same generations. Not collective. Thread-safe."""
    groups: dict[tuple[Origin, str], list[Holding]] = {}
    for holding in holdings:
        groups.setdefault((holding.origin, holding.identity), []).append(holding)
    found = []
    for (origin, _), group in groups.items():
        holders: list[list[int]] = [[] for _ in range(group[0].files)]
        for holding in sorted(group, key=lambda holding: holding.holder):
            for file in holding.held:
                holders[file].append(holding.holder)
        ranks = tuple(sorted(holding.holder for holding in group))
        step, nbytes = group[0].step, group[0].manifest_bytes
        whole = tuple(map(tuple, holders))
        found.append(HeldGeneration(origin, step, whole, ranks, nbytes))
    return found


def _newest_first(
    found: Sequence[HeldGeneration], lineage: Lineage | None, rolled_back: int
) -> list[HeldGeneration]:
    """Return the generations on the lineage, newest first."""
    if lineage is None:
        return []
    limits = lineage.limits()
    # A rollback in the directory also takes back what runs before it left on hosts.
    behind = {run.run: run.behind for run in lineage.runs}
    place = {run: number for number, run in enumerate(limits)}

    def counts(held: HeldGeneration) -> bool:
        origin = held.origin
        if origin.run not in limits or behind[origin.run] < rolled_back:
            return False
        limit = limits[origin.run]
        return limit is None or origin[1:] <= limit[1:]

    return sorted(
        filter(counts, found),
        key=lambda held: (-place[held.origin.run], held.origin[1:]),
        reverse=True,
    )


_NAMED = 8


def what_is_lost(
    verdict: LocalChoice,
    lineage: Lineage | None,
    runs: Collection[str],
    *,
    newest: int,
    here: Collection[str],
) -> str:
    """Return in words which newer work the hosts cannot complete; empty for none.

    Not collective. Thread-safe.

    Args:
        verdict: The choice.
        lineage: The runs that have saved to hosts; None if none is known.
        runs: Those of which any host at hand has a generation.
        newest: Number of the newest good generation in the directory; 0 for none.
        here: Names of the hosts of this job.
    """
    if lineage is None or not lineage.runs:
        return ""
    run = lineage.runs[-1]
    where = _missing(run.hosts, here)
    if verdict.lost:
        last = verdict.lost[0]
        return (
            f"hosts kept a generation of step {last.step}, and those of this job do not "
            f"hold all of it any more ({where}): {_instead(verdict.chosen, last, newest)}"
        )
    if run.run in runs or (run.settled and newest >= run.settled):
        return ""
    return (
        f"the last run kept generations in {run.path} on its hosts ({where}), and those "
        "of this job have none of them: any steps after "
        f"{f'generation {newest} of the directory' if newest else 'the start'} are lost"
    )


def _instead(chosen: HeldGeneration | None, last: HeldGeneration, newest: int) -> str:
    if chosen is not None:
        steps = last.step - chosen.step
        return (
            f"step {chosen.step}, which hosts keep, comes instead; {steps} steps are lost"
        )
    if newest:
        return (
            f"generation {newest} of the directory comes instead; the steps since are lost"
        )
    return "there is no other generation, and all steps are lost"


def _missing(hosts: Collection[str], here: Collection[str]) -> str:
    gone = [host for host in hosts if host not in here]
    if not gone:
        return "they are all here, without their files"
    more = f" and {len(gone) - _NAMED:,} more" if len(gone) > _NAMED else ""
    verb = "is" if len(gone) == 1 else "are"
    return f"{', '.join(gone[:_NAMED])}{more} {verb} not among them"
