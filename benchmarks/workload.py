# SPDX-License-Identifier: Apache-2.0
"""What is saved: the Adam state of a model, with a real model's spread of sizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["MODELS", "adam_state", "model_shapes", "scaled", "tensor_sizes"]

Shape = tuple[int, ...]

# Shares of a transformer's parameters by tensor: few large, many small.
_TENSORS_PER_BLOCK = 12
_BLOCKS = 4

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""A parameter and the two moments Adam keeps of it."""


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


def _adam100m() -> list[Shape]:
    return [(size,) for size in tensor_sizes(100_000_000)]


def _resnet50() -> list[Shape]:
    shapes: list[Shape] = []

    def convolution(out: int, into: int, kernel: int) -> None:
        # Its weight; scale and shift of the normalisation behind it.
        shapes.extend([(out, into, kernel, kernel), (out,), (out,)])

    convolution(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, into, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (1000, into), (1000,)]


def _bert_base() -> list[Shape]:
    width, inner = 768, 3072
    norm = [(width,), (width,)]
    square = [(width, width), (width,)]
    layer = [*square * 4, *norm, (inner, width), (inner,), (width, inner), (width,), *norm]
    embeddings = [(30522, width), (512, width), (2, width), *norm]
    return [*embeddings, *layer * 12, *square]


def _gpt2() -> list[Shape]:
    width = 768
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    inner = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *[*norm, *attention, *norm, *inner] * 12, *norm]


def _llama_7b() -> list[Shape]:
    width, inner, words = 4096, 11008, 32000
    attention = [(width, width)] * 4
    layer = [*attention, (inner, width), (width, inner), (inner, width), (width,), (width,)]
    return [(words, width), *layer * 32, (width,), (words, width)]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "adam100m": _adam100m,
    "resnet50": _resnet50,
    "bert-base": _bert_base,
    "gpt2": _gpt2,
    "llama-7b": _llama_7b,
}
"""Name -> the shapes of its parameters."""


def model_shapes(model: str, megabytes: float | None = None) -> list[Shape]:
    """Return the shapes of a model's parameters.

    Args:
        model: One of `MODELS`.
        megabytes: Shrink or stretch the shapes until parameters and moments take about
            so many (10^6 bytes); None leaves them as they are.
    """
    shapes = MODELS[model]()
    if megabytes is None:
        return shapes
    own = sum(map(math.prod, shapes)) * 4 * len(KINDS)
    return [scaled(shape, megabytes * 1e6 / own) for shape in shapes]


def scaled(shape: Shape, factor: float) -> Shape:
    """Return a shape of about ``factor`` times the elements; kernels keep their size."""
    first, *rest = shape
    if not rest:
        return (max(1, round(first * factor)),)
    width = math.sqrt(factor)
    second, *kernel = rest
    return (max(1, round(first * width)), max(1, round(second * width)), *kernel)


def adam_state(shapes: Sequence[Shape], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 parameters of these shapes and two moments of each."""
    generator = np.random.default_rng(seed)
    return {
        # Random bytes: nothing on the way may gain by zeros.
        f"{kind}/{index:03d}": generator.random(shape, np.float32)
        for index, shape in enumerate(shapes)
        for kind in KINDS
    }
