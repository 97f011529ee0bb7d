# SPDX-License-Identifier: Apache-2.0
"""Handles wrappers around a module: looks through data-parallel ones, refuses sharding."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import RegistrationError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

# Class -> the attribute that holds the wrapped module. Each class puts a prefix before all
# names: a state saved with it would not fit a program without it.
_TRANSPARENT = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
)
_PREFIXES = tuple({f"{attribute}." for _, _, attribute in _TRANSPARENT})
_FSDP = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")


def unwrapped(state: str, module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside DistributedDataParallel, torch.compile and the like.

    Not collective.

    Args:
        state: Name of the state, for the message.
        module: Any module.

    Raises:
        RegistrationError: On the calling rank, if it is no module, or a part of it is
            sharded by FullyShardedDataParallel: only all ranks together hold its contents.
    """
    given: Any = module
    has_parts = callable(getattr(given, "state_dict", None)) and hasattr(given, "modules")
    if isinstance(given, type) or not has_parts:
        raise RegistrationError(f"state {state!r}: {_no_module(given)}")
    if any(is_of_class(part, *_FSDP) for part in module.modules()):
        raise RegistrationError(
            f"state {state!r}: the module is sharded by FullyShardedDataParallel, whose "
            "flat parameters hide which part of which parameter a rank has. Shard it by "
            "torch.distributed.fsdp.fully_shard, which a state saves as it is"
        )
    attribute = _wraps(module)
    while attribute is not None:
        module = getattr(module, attribute)
        attribute = _wraps(module)
    return module


def _no_module(given: object) -> str:
    kind = type(given).__name__
    if isinstance(given, type):
        return f"module is the class {given.__name__}: give an object of it"
    if isinstance(given, dict):
        return (
            f"module is not a torch.nn.Module but of type {kind}: if that is its "
            "state_dict(), give the module itself, which a save reads and a restore fills"
        )
    return (
        f"module is not a torch.nn.Module but of type {kind}; for another object with "
        "state_dict() and load_state_dict(), take a SchedulerState"
    )


def inner_names(module: torch.nn.Module) -> Callable[[str], str]:
    """Return a function that removes wrappers from the names of a module's entries.

    Not collective. Wrappers may be around any part of the module: a compiled block, an
    averaged copy of a data-parallel model.

    Args:
        module: Any module.
    """
    wrapped = []
    for path, part in module.named_modules(remove_duplicate=False):
        attribute = _wraps(part)
        if attribute is not None:
            outer = f"{path}." if path else ""
            wrapped.append((f"{outer}{attribute}.", outer))
    # From the inside out: a cut must leave the outer prefixes unchanged.
    wrapped.sort(key=lambda pair: -len(pair[0]))

    def inner(name: str) -> str:
        for prefix, outer in wrapped:
            if name.startswith(prefix):
                name = outer + name[len(prefix) :]
        return name

    return inner


def bare_name(name: str) -> str:
    """Return a parameter's name without the names of wrappers around the module.

    Not collective. Thread-safe. For names alone, without a module.
    """
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def parameter_names(module: torch.nn.Module) -> dict[int, str]:
    """Return id -> name of each parameter, without the names of wrappers.

    Not collective. A tied parameter gets the first of its names.
    """
    inner = inner_names(module)
    return {id(parameter): inner(name) for name, parameter in module.named_parameters()}


def tied_names(module: torch.nn.Module) -> dict[str, str]:
    """Return each name of a module's parameters -> the one in `parameter_names`.

    Not collective. Which of a tied parameter's names comes first depends on the order of
    the modules, which may be another one in the next run.
    """
    first, inner = parameter_names(module), inner_names(module)
    every = module.named_parameters(remove_duplicate=False)
    return {inner(name): first[id(parameter)] for name, parameter in every}


def is_dtensor(tensor: object) -> bool:
    """Return whether a tensor is a DTensor, of which each rank of a mesh has a part.

    Not collective. Thread-safe.
    """
    return is_of_class(tensor, "torch.distributed.tensor", "DTensor")


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is this rank's part of a tensor split over ranks.

    Not collective. Thread-safe.
    """
    home = "torch.distributed._shard.sharded_tensor"
    return is_dtensor(tensor) or is_of_class(tensor, home, "ShardedTensor")


def _wraps(module: torch.nn.Module) -> str | None:
    for home, kind, attribute in _TRANSPARENT:
        if is_of_class(module, home, kind):
            return attribute
    return None


def is_of_class(value: object, home: str, kind: str) -> bool:
    """Return whether a value is of a class of torch's, without importing it.

    Not collective. Thread-safe.
    """
    # It can only be one if the program has imported the class; an import costs seconds.
    known: Any = getattr(sys.modules.get(home), kind, None)
    return known is not None and isinstance(value, known)
