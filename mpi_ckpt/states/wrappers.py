# SPDX-License-Identifier: Apache-2.0
"""What stands around a module: replicas' wrappers are seen through, sharding refused."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import RegistrationError

if TYPE_CHECKING:
    import torch

__all__ = ["is_sharded", "unwrapped"]

# Class -> the attribute under which it keeps the module it wraps. Each puts a prefix
# before all names: what is saved with it would not fit a program without it.
_TRANSPARENT = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
)
_FSDP = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")


def unwrapped(state: str, module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside of DistributedDataParallel, torch.compile and the like.

    Not collective.

    Args:
        state: Name of the state, for the message.
        module: Any module.

    Raises:
        RegistrationError: On the calling rank, if a part of it is sharded by
            FullyShardedDataParallel: only all ranks together could give its contents.
    """
    if any(_is_a(one, *_FSDP) for one in module.modules()):
        raise RegistrationError(
            f"state {state!r}: the module is sharded by FullyShardedDataParallel, and each "
            "rank has a part of it; mpi_ckpt saves replicas. Use torch.distributed."
            "checkpoint for it"
        )
    attribute = _wraps(module)
    while attribute is not None:
        module = getattr(module, attribute)
        attribute = _wraps(module)
    return module


def is_sharded(tensor: object) -> bool:
    """Tell whether a tensor is this rank's part of one that several ranks hold.

    Not collective. Thread-safe.
    """
    return any(
        _is_a(tensor, module, kind)
        for module, kind in (
            ("torch.distributed.tensor", "DTensor"),
            ("torch.distributed._shard.sharded_tensor", "ShardedTensor"),
        )
    )


def _wraps(module: torch.nn.Module) -> str | None:
    for home, kind, attribute in _TRANSPARENT:
        if _is_a(module, home, kind):
            return attribute
    return None


def _is_a(value: object, home: str, kind: str) -> bool:
    # It can only be one if the program has imported the class; importing costs seconds.
    known: Any = getattr(sys.modules.get(home), kind, None)
    return known is not None and isinstance(value, known)
