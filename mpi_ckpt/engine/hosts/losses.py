# SPDX-License-Identifier: Apache-2.0
"""Says in words which work on hosts a restore cannot bring back. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from mpi_ckpt.engine.hosts.completable import HeldGeneration, LocalChoice
    from mpi_ckpt.storage.local.lineage import Lineage

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
