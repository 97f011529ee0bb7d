# SPDX-License-Identifier: Apache-2.0
"""Finds what a rank has of a DTensor, and makes DTensors like others.

A DTensor knows its mesh and its placements, so it needs no word from the program. They are
not saved: a restore asks those that the program has then.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpi_ckpt.decomposition.mesh_boxes import MeshCut, MeshPiece, mesh_pieces
from mpi_ckpt.errors import StageError
from mpi_ckpt.states.wrappers import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaves.leaf import LeafSpec


def local_tensor(tensor: Any) -> Any:  # noqa: ANN401 (a torch tensor)
    """Return the memory of a tensor: of a DTensor this rank's part, else the tensor.

    Not collective.
    """
    if not is_dtensor(tensor):
        return tensor
    with sys.modules["torch"].no_grad():
        return tensor.to_local()


def local_pieces(name: str, tensor: Any) -> Sequence[MeshPiece]:  # noqa: ANN401
    """Return the boxes of a DTensor that this rank has.

    Not collective.

    Args:
        name: Its name, for messages.
        tensor: A DTensor.

    Returns:
        The boxes, and their places in the local tensor; none on a rank outside the mesh.

    Raises:
        StageError: On the calling rank, if the rank's part is no set of boxes, or the local
            tensor has another shape.
    """
    mesh = tensor.device_mesh
    cuts = _cuts(name, tensor)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    here = tuple(
        tuple(MeshCut(mesh.size(dim), coordinate[dim], strides) for dim, strides in of)
        for of in cuts
    )
    try:
        shape, pieces = mesh_pieces(tuple(tensor.shape), here)
    except ValueError as error:
        raise _refusal(name, tensor, f"{error}: what each rank has is unknown") from None
    local = tuple(tensor.to_local().shape)
    # Some releases of torch give an empty part no dimensions of its own.
    if local != shape and (pieces or 0 not in local):
        raise _refusal(
            name,
            tensor,
            f"its placements give this rank a part of shape {shape}, its local tensor has "
            f"shape {local}",
        )
    return pieces


def make_like(spec: LeafSpec, dtype: Any, like: Any) -> Any:  # noqa: ANN401
    """Make an empty DTensor for a leaf, over the mesh of another.

    Not collective. Call it within `ordinary`.

    Args:
        spec: Of the leaf.
        dtype: Its torch dtype.
        like: A DTensor. The new one has its placements if it has its shape; otherwise each
            rank has the whole.
    """
    import torch
    from torch.distributed.tensor import DTensor, Replicate

    if spec.shape == tuple(like.shape):
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    mesh = like.device_mesh
    whole = torch.empty(spec.shape, dtype=dtype, device=like.device)
    # Without its check, which is collective, as is a shape that torch has to find.
    return DTensor.from_local(
        whole,
        mesh,
        [Replicate()] * mesh.ndim,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _cuts(name: str, tensor: Any) -> list[list[tuple[int, int]]]:  # noqa: ANN401
    """Return mesh dimension and strides of the cuts of each tensor dimension."""
    kinds: Any = sys.modules["torch.distributed.tensor.placement_types"]
    # The private placement of FSDP2 over tensor parallelism; older releases derive it from
    # Shard.
    strided: Any = getattr(kinds, "_StridedShard", ())
    cuts: list[list[tuple[int, int]]] = [[] for _ in tensor.shape]
    for dim, placement in enumerate(tensor.placements):
        if strided and isinstance(placement, strided):
            cuts[placement.dim].append((dim, int(placement.split_factor)))
        elif isinstance(placement, kinds.Shard):
            cuts[placement.dim].append((dim, 1))
        elif isinstance(placement, kinds.Partial):
            raise _refusal(
                name,
                tensor,
                f"its values are partial results of mesh dimension {dim}: redistribute() "
                "it to Shard or Replicate before the save",
            )
        elif not isinstance(placement, kinds.Replicate):
            raise _refusal(name, tensor, f"{placement} is no placement known here")
    return cuts


def _refusal(name: str, tensor: Any, problem: str) -> StageError:  # noqa: ANN401
    return StageError(
        f"tensor {name!r}, a DTensor of shape {list(tensor.shape)} with placements "
        f"{tuple(tensor.placements)} on {tensor.device_mesh}, cannot be saved: {problem}; "
        "a way out is to save its full_tensor()"
    )
