# SPDX-License-Identifier: Apache-2.0
"""Reads and sets the state of each kind of random number stream."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.random import SeedSequence

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_ACCELERATORS = ("cuda", "xpu")


class Stream(Protocol):
    """One stream of random numbers. Not collective."""

    kind: str
    """What it draws with: the states of another kind say nothing to it."""

    def get(self) -> Any:  # noqa: ANN401
        """Return the stream's state as a nested value."""

    def set(self, state: Any) -> None:  # noqa: ANN401
        """Set a state that `get` of the same kind of stream has returned."""

    def seed(self, seed: int) -> None:
        """Restart the stream from a seed of 64 bits."""


class _Python:
    kind = "random.Random"

    def __init__(self, source: Any) -> None:  # noqa: ANN401 (module random, or a Random)
        self._source = source

    def get(self) -> Any:  # noqa: ANN401
        state = self._source.getstate()
        if state[0] != random.Random.VERSION:
            return state  # of a class of the program
        version, words, gauss = state
        return version, np.array(words, np.uint32), gauss

    def set(self, state: Any) -> None:  # noqa: ANN401
        # Older checkpoints have the words as a tuple.
        items = [tuple(x.tolist()) if isinstance(x, np.ndarray) else x for x in state]
        self._source.setstate(tuple(items))

    def seed(self, seed: int) -> None:
        self._source.seed(seed)


class _Legacy:
    """NumPy's global stream, or a `RandomState`."""

    def __init__(self, source: Any, bits: Any) -> None:  # noqa: ANN401
        self._source, self._bits = source, bits
        self.kind = f"RandomState/{type(bits).__name__}"

    def get(self) -> Any:  # noqa: ANN401
        return _plain(self._source.get_state(legacy=False))

    def set(self, state: Any) -> None:  # noqa: ANN401
        self._source.set_state(state)

    def seed(self, seed: int) -> None:
        bits = type(self._bits)(seed).state
        # The second number of a pair drawn before belongs to the old stream.
        self._source.set_state({**bits, "has_gauss": 0, "gauss": 0.0})


class _Generator:
    """A NumPy generator, and the number of streams spawned from it."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._bits: Any = generator.bit_generator
        self.kind = f"Generator/{type(self._bits).__name__}"

    def get(self) -> Any:  # noqa: ANN401
        # NumPy before 1.25 only has the private name.
        seeds = getattr(self._bits, "seed_seq", getattr(self._bits, "_seed_seq", None))
        return {
            "bits": _plain(self._bits.state),
            # Another kind of sequence is code of the program, with an unknown state.
            "seeds": _seeds_of(seeds) if type(seeds) is SeedSequence else None,
        }

    def set(self, state: Any) -> None:  # noqa: ANN401
        bits, seeds = state["bits"], state["seeds"]
        if seeds is None:
            self._bits.state = bits
        else:
            # The same as unpickling does, in place.
            self._bits.__setstate__((bits, SeedSequence(**seeds)))

    def seed(self, seed: int) -> None:
        fresh = type(self._bits)(seed)
        self._bits.__setstate__((fresh.state, fresh.seed_seq))


class _Torch:
    def __init__(self, generator: Any) -> None:  # noqa: ANN401 (torch.Generator)
        self._generator = generator
        self.kind = f"torch.Generator/{generator.device.type}"

    def get(self) -> Any:  # noqa: ANN401
        return self._generator.get_state().numpy().tobytes()

    def set(self, state: Any) -> None:  # noqa: ANN401
        from mpi_ckpt.states.buffers.tensor_bytes import ordinary

        with ordinary():
            data = sys.modules["torch"].frombuffer(bytearray(state), dtype=_bytes())
            self._generator.set_state(data)

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed % 2**63)


def stream_of(generator: object) -> Stream | None:
    """Return the stream of a generator; None for an unknown kind.

    Not collective.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(generator, torch.Generator):
        return _Torch(generator)
    if isinstance(generator, np.random.Generator):
        return _Generator(generator)
    if isinstance(generator, np.random.RandomState):
        return _Legacy(generator, generator._bit_generator)  # noqa: SLF001 (has no other)
    # The system's own generator has no state.
    if isinstance(generator, random.Random) and type(generator) is not random.SystemRandom:
        return _Python(generator)
    return None


def built_in_streams() -> dict[str, Stream]:
    """Return the global streams of this process by name: Python's, NumPy's and torch's.

    Not collective. torch's only if the program has imported it; those of its devices only
    if used.
    """
    streams: dict[str, Stream] = {
        "python": _Python(random),
        # NumPy's type stubs do not know its own name.
        "numpy": _Legacy(np.random, _numpy_bits()),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        streams["torch"] = _Torch(torch.default_generator)
        streams |= dict(_device_streams(torch))
    return streams


def is_of_device(name: str) -> bool:
    """Return whether a built-in stream is that of a device. Not collective."""
    return name.partition(":")[0] in _ACCELERATORS


def wake_devices(names: Iterable[str]) -> None:
    """Initialise devices whose streams were saved: an unused device has no stream.

    Not collective.
    """
    for kind in sorted({name.partition(":")[0] for name in names if is_of_device(name)}):
        import torch

        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            module.init()


def _device_streams(torch: Any) -> Iterator[tuple[str, Stream]]:  # noqa: ANN401
    for kind in _ACCELERATORS:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available() and module.is_initialized():
            for number, generator in enumerate(module.default_generators):
                yield f"{kind}:{number}", _Torch(generator)


def _seeds_of(seeds: SeedSequence) -> dict[str, Any]:
    entropy: Any = seeds.entropy
    return {
        "entropy": entropy if isinstance(entropy, int) else _plain(entropy),
        "spawn_key": tuple(seeds.spawn_key),
        "pool_size": seeds.pool_size,
        "n_children_spawned": seeds.n_children_spawned,
    }


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Turn NumPy's scalars into plain numbers, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _numpy_bits() -> Any:  # noqa: ANN401
    return vars(np.random)["get_bit_generator"]()


def _bytes() -> Any:  # noqa: ANN401
    return sys.modules["torch"].uint8
