# SPDX-License-Identifier: Apache-2.0
"""Writes one generation. Root alone, no MPI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpi_ckpt.collector import without_collections
from mpi_ckpt.comm import ROOT
from mpi_ckpt.engine.contents import pick_leaves
from mpi_ckpt.engine.draft import Draft
from mpi_ckpt.engine.shard import write_shard

if TYPE_CHECKING:
    from mpi_ckpt.engine.draft import Published, SaveRequest
    from mpi_ckpt.options import Options
    from mpi_ckpt.reports import PhaseClock
    from mpi_ckpt.storage.directory import CheckpointDirectory

__all__ = ["write_generation"]


@without_collections
def write_generation(
    directory: CheckpointDirectory,
    request: SaveRequest,
    options: Options,
    clock: PhaseClock,
) -> Published:
    """Write a generation and publish it; on any failure leave nothing behind.

    Not collective. Called on root, which owns the directory.

    Args:
        directory: Owned by this job.
        request: What to save; contents must not change meanwhile.
        options: Say what is shared with older generations, and which of them may go;
            nothing is removed here.
        clock: Gets the phases ``write`` and ``publish``.

    Raises:
        SaveError: On the calling rank; nothing was published.
    """
    with clock.phase("write"):
        draft = Draft(directory, request, options)
    with draft:
        with clock.phase("write"):
            draft.write_streams(request.plain)
            chosen = zip(draft.contents, draft.fresh, strict=True)
            fresh = [pick_leaves(one, numbers) for one, numbers in chosen]
            shard = write_shard(draft.partial, fresh, ROOT)
        return draft.publish([shard] if shard else [], clock)
