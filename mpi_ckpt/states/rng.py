# SPDX-License-Identifier: Apache-2.0
"""The random number streams of every rank."""

from __future__ import annotations

import json
import random
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mpi_ckpt.errors import CorruptGenerationError, RegistrationError
from mpi_ckpt.states.ranked import RankedState
from mpi_ckpt.states.tree import flatten, unflatten

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["RNGState"]


class RNGState(RankedState):
    """Random number streams: python's, NumPy's, torch's, and generators of your own.

    Every rank has its own streams and gets them back bit for bit when the number of
    ranks is the same. With another number, rank ``r`` gets those of saved rank ``r``; a
    rank beyond the saved ones gets streams seeded from ``r`` and those of saved rank
    ``r % saved``, so no two ranks share a stream and the outcome is the same each time.

    torch's streams, CUDA's among them, are saved if the program has imported torch.

    Args:
        name: As for `mpi_ckpt.State`.
        generators: Generators of your own by name: ``numpy.random.Generator``,
            ``torch.Generator`` or ``random.Random``. The same names on every rank.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal or a
            generator is of another kind.
    """

    contents = "random streams"
    count_key = "size"

    def __init__(
        self, name: str = "rng", *, generators: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(name)
        self._generators = dict(generators or {})
        for key, generator in self._generators.items():
            if _stream_of(generator) is None:
                raise RegistrationError(
                    f"state {name!r}: generator {key!r} is a {type(generator).__name__}, "
                    "not a numpy.random.Generator, torch.Generator or random.Random"
                )

    def part(self) -> bytes:
        """See `PartsState`. Not collective."""
        streams = {key: stream.get() for key, stream in self._streams().items()}
        return json.dumps(flatten_to_json(streams)).encode()

    def source(self, rank: int, saved: int) -> int:
        """See `RankedState`. Not collective."""
        return rank % saved

    def take(self, part: bytes, saved: int) -> None:
        """See `RankedState`. Not collective.

        Raises:
            CorruptGenerationError: On the calling rank, if it is not what was saved.
        """
        try:
            states = json.loads(part)
        except ValueError as error:
            raise CorruptGenerationError(f"state {self.name!r}: {error}") from error
        for key, stream in self._streams().items():
            if self._rank < saved and key in states:
                stream.set(json_to_value(states[key]))
            elif self._rank >= saved:
                seed = xxhash.xxh3_64_intdigest(part, seed=self._rank)
                stream.seed(seed ^ xxhash.xxh3_64_intdigest(key.encode()))

    def _streams(self) -> dict[str, Any]:
        streams: dict[str, Any] = {"python": _Python(random), "numpy": _NumPyGlobal()}
        torch = sys.modules.get("torch")
        if torch is not None:
            streams["torch"] = _Torch(torch.default_generator)
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                index = torch.cuda.current_device()
                streams["cuda"] = _Torch(torch.cuda.default_generators[index])
        for key, generator in self._generators.items():
            streams[f"generator/{key}"] = _stream_of(generator)
        return streams


def flatten_to_json(value: Any) -> Any:  # noqa: ANN401 (any nested value)
    """Return a nested value without tensors as JSON values. Not collective."""
    return flatten(value).structure


def json_to_value(structure: Any) -> Any:  # noqa: ANN401 (any nested value)
    """Undo `flatten_to_json`. Not collective."""
    return unflatten(structure, {})


# One small class for each kind of stream: get() gives JSON-able values, set() takes them
# back, seed() starts anew.


class _Python:
    def __init__(self, source: Any) -> None:  # noqa: ANN401 (module random, or a Random)
        self._source = source

    def get(self) -> Any:  # noqa: ANN401
        return self._source.getstate()

    def set(self, state: Any) -> None:  # noqa: ANN401
        self._source.setstate(state)

    def seed(self, seed: int) -> None:
        self._source.seed(seed)


class _NumPyGlobal:
    """NumPy's legacy global stream, used by ``np.random.rand`` and friends."""

    def get(self) -> Any:  # noqa: ANN401
        legacy: Any = np.random.get_state()
        kind, keys, position, has_gauss, gauss = legacy
        return [kind, keys.tolist(), int(position), int(has_gauss), float(gauss)]

    def set(self, state: Any) -> None:  # noqa: ANN401
        kind, keys, *rest = state
        np.random.set_state((kind, np.array(keys, np.uint32), *rest))

    def seed(self, seed: int) -> None:
        np.random.seed(seed % 2**32)


class _NumPyGenerator:
    def __init__(self, generator: np.random.Generator) -> None:
        self._bits = generator.bit_generator

    def get(self) -> Any:  # noqa: ANN401
        return _plain(self._bits.state)

    def set(self, state: Any) -> None:  # noqa: ANN401
        self._bits.state = state

    def seed(self, seed: int) -> None:
        self._bits.state = type(self._bits)(seed).state


class _Torch:
    def __init__(self, generator: Any) -> None:  # noqa: ANN401 (torch.Generator)
        self._generator = generator

    def get(self) -> Any:  # noqa: ANN401
        return self._generator.get_state().numpy().tobytes()

    def set(self, state: Any) -> None:  # noqa: ANN401
        torch = sys.modules["torch"]
        self._generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed % 2**63)


def _stream_of(generator: Any) -> Any:  # noqa: ANN401
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(generator, torch.Generator):
        return _Torch(generator)
    if isinstance(generator, np.random.Generator):
        return _NumPyGenerator(generator)
    if isinstance(generator, random.Random):
        return _Python(generator)
    return None


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Make a bit generator's state plain: lists for arrays."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
