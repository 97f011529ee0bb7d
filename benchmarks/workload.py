# SPDX-License-Identifier: Apache-2.0
"""What is saved: the Adam state of a model, with a real model's spread of sizes."""

from __future__ import annotations

import numpy as np

__all__ = ["adam_state", "tensor_sizes"]

# Shares of a transformer's parameters by tensor: few large, many small.
_TENSORS_PER_BLOCK = 12
_BLOCKS = 4


def tensor_sizes(parameters: int) -> list[int]:
    """Return how many parameters each of 50 tensors has: matrices, and biases between."""
    weights = []
    for _ in range(_BLOCKS):
        weights += [1.0, 1e-3] * (_TENSORS_PER_BLOCK // 2)
    weights += [4.0, 1e-3]
    unit = parameters / sum(weights)
    sizes = [max(1, int(unit * weight)) for weight in weights]
    sizes[-2] += parameters - sum(sizes)
    return sizes


def adam_state(megabytes: float, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 parameters and two moments of each, ``megabytes`` (10^6) in all."""
    generator = np.random.default_rng(seed)
    state = {}
    for index, size in enumerate(tensor_sizes(int(megabytes * 1e6 / 12))):
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            # Random bytes: nothing on the way may gain by zeros.
            state[f"{kind}/{index:03d}"] = generator.random(size, np.float32)
    return state
