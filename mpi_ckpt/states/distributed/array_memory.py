# SPDX-License-Identifier: Apache-2.0
"""Finds whether a value is an array or tensor with plain memory of its own."""

from __future__ import annotations

import numpy as np

from mpi_ckpt.errors import StageError
from mpi_ckpt.states.leaf_values import is_leaf_value, memory_leaf
from mpi_ckpt.states.wrappers import is_sharded

# Other subclasses hold more than numbers (a unit, a mask), which the file would lack.
_ARRAYS = (np.ndarray, np.memmap, np.recarray)


def memory_problem(value: object) -> str:
    """Return why a value is no array in memory of its own, empty if it is.

    Not collective.

    Args:
        value: Anything.

    Returns:
        The rest of a sentence about the value.
    """
    if isinstance(value, np.generic):
        return "is a NumPy scalar: bytes cannot be put into it; give an array"
    is_array = isinstance(value, np.ndarray)
    if not is_leaf_value(value) or (is_array and type(value) not in _ARRAYS):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return (
            f"is a {kind.removeprefix('builtins.')}, expected a NumPy array or a torch "
            "tensor: give np.asarray() of it if that shares its memory"
        )
    if is_sharded(value):
        return (
            f"is a {type(value).__name__}, which knows its own place in the whole: give it "
            "to a ModuleState, an OptimizerState, a TrainState or an ObjectState as it is"
        )
    try:
        memory_leaf("it", value)
    except StageError as error:
        return f"has no plain memory: {error}"
    return ""
