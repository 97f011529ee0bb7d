# SPDX-License-Identifier: Apache-2.0
"""What every rank needs to know of a generation, or of a copy in memory, as JSON values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.engine.contents import Contents
from mpi_ckpt.engine.stage import StagedStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.engine.draft import SaveRequest
    from mpi_ckpt.state import State
    from mpi_ckpt.storage.manifest import Extent, Manifest

__all__ = ["describe_copy", "describe_generation", "title_of"]

_COPY = 0
"""Stands for the number that a copy in memory has not."""


def describe_generation(manifest: Manifest) -> dict[str, Any]:
    """Return what ranks other than root need of a manifest.

    Not collective. Thread-safe.
    """
    numbers = {file.name: number for number, file in enumerate(manifest.files)}

    def place(extent: Extent) -> list[int]:
        return [numbers[extent.file], extent.offset, extent.nbytes]

    return {
        "generation": manifest.generation,
        "step": manifest.step,
        "size": manifest.size,
        "metrics": dict(manifest.metrics),
        "block_bytes": manifest.block_bytes,
        "states": {
            state.name: {"places": [place(state.stream)]}
            if state.stream is not None
            else {
                "places": [place(leaf.extent) for leaf in state.leaves],
                "structure": state.structure,
                "leaves": [leaf.spec.to_json() for leaf in state.leaves],
            }
            for state in manifest.states
        },
    }


def describe_copy(
    request: SaveRequest, staged: Sequence[Contents | State]
) -> dict[str, Any]:
    """Return the same of a copy in memory, whose bytes have no place in a file.

    Not collective. Thread-safe.

    Args:
        request: What was copied.
        staged: The copies.
    """
    return {
        "generation": _COPY,
        "step": request.step,
        "size": request.size,
        "metrics": dict(request.metrics),
        "states": {one.name: _describe_staged(one) for one in staged},
    }


def title_of(description: dict[str, Any]) -> str:
    """Return what messages call what is described. Not collective. Thread-safe."""
    number: int = description["generation"]
    return "the copy in memory" if number == _COPY else f"generation {number}"


def _describe_staged(one: Contents | State) -> dict[str, Any]:
    if not isinstance(one, Contents):
        assert isinstance(one, StagedStream)
        return {"places": [[0, 0, one.leaf().spec.nbytes]]}
    return {
        "places": [[0, 0, spec.nbytes] for spec in one.specs],
        "structure": one.structure,
        "leaves": [spec.to_json() for spec in one.specs],
    }
