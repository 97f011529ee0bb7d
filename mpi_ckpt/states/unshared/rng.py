# SPDX-License-Identifier: Apache-2.0
"""Saves the random number streams of every rank."""

from __future__ import annotations

import importlib.util
import logging
import random
import sys
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash
from numpy.random import SeedSequence

from mpi_ckpt.errors import (
    CorruptGenerationError,
    DivergedError,
    RegistrationError,
    StageError,
)
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.packed import pack, unpack
from mpi_ckpt.states.unshared.ranked import RankedState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from mpi_ckpt.state import Structure

__all__ = ["RNGState"]

logger = logging.getLogger(__name__)


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


_OWN = "generator/"
_GLOBAL = ("python", "numpy", "torch")
_DAMAGED = (TypeError, KeyError, ValueError, AttributeError)


class RNGState(RankedState):
    """Random number streams: Python's, NumPy's, torch's, and your own generators.

    Every rank has its own streams and gets them back bit for bit when the number of ranks
    is the same. With another number, rank ``r`` gets those of saved rank ``r``; a rank
    beyond the saved ones gets streams seeded from ``r`` and those of saved rank ``r %
    saved``, so no two ranks share a stream and the result is reproducible. Name a stream
    that all ranks use alike in ``shared``: it is equal on all ranks after a restore too,
    whatever their number.

    If the program has imported torch, torch's streams are saved, with those of all its used
    devices. For a NumPy generator, the number of spawned streams is saved too.

    Args:
        name: As for `mpi_ckpt.State`.
        generators: Your own generators by name: ``numpy.random.Generator`` or
            ``RandomState``, ``torch.Generator`` or ``random.Random``. The same names and
            kinds on every rank.
        shared: Names of streams that are the same on all ranks: of ``generators``, or
            ``"python"``, ``"numpy"``, ``"torch"``. A save fails if they differ.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal, a generator
            is of another kind, or a shared one does not exist.
    """

    contents = "random streams"
    first_key = "size"

    def __init__(
        self,
        name: str = "rng",
        *,
        generators: Mapping[str, Any] | None = None,
        shared: Collection[str] = (),
    ) -> None:
        super().__init__(name)
        self._own: dict[str, Stream] = {}
        for key, generator in (generators or {}).items():
            stream = stream_of(generator)
            if stream is None:
                raise RegistrationError(
                    f"state {name!r}: generator {key!r} is a {type(generator).__name__}, "
                    "not a numpy.random.Generator or RandomState, torch.Generator or "
                    "random.Random"
                )
            self._own[_OWN + key] = stream
        named = {key: key if key in _GLOBAL else _OWN + key for key in shared}
        unknown = [k for k, full in named.items() if full not in (*self._own, *_GLOBAL)]
        if unknown:
            raise RegistrationError(
                f"state {name!r}: shared names {unknown}, which are no generators of it: "
                "give the generators in generators={'mine': ...}, and in shared= the "
                "names of those that are the same on all ranks, ['mine']"
            )
        self._shared = frozenset(named.values())

    def own_value(self) -> Any:  # noqa: ANN401
        """See `RankedState`. Not collective."""
        states = {key: stream.get() for key, stream in self._streams().items()}
        shared = sorted(self._shared & set(states))
        head = {
            # Each rank decides for itself whether to import torch.
            "kinds": {k: v for k, v in self._kinds_now().items() if k != "torch"},
            "shared": {key: xxhash.xxh3_128_hexdigest(pack(states[key])) for key in shared},
        }
        return {**head, "streams": states}

    def compare(self, structures: Sequence[Structure]) -> None:
        """See `RankedState`. Not collective.

        Raises:
            DivergedError: On root, if a shared stream is not the same on all ranks.
            StageError: On root, if ranks have different streams.
        """
        roots = structures[0]
        for rank, theirs in enumerate(structures):
            if any(theirs[key] != roots[key] for key in ("kinds", "shared")):
                self._refuse(rank, roots, theirs)

    def alike(self, structure: Structure) -> Structure:
        """See `RankedState`. Not collective."""
        assert isinstance(structure, dict)
        return {key: structure[key] for key in ("kinds", "shared")}

    def form(self, count: int) -> Structure:
        """See `RankedState`. Not collective."""
        return {
            **super().form(count),
            "kinds": self._kinds_now(),
            "shared": sorted(self._shared),
        }

    def check(
        self, structure: Structure, count: int, *, strict: bool
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `RankedState`. Not collective."""
        super().check(structure, count, strict=strict)
        saved = dict(structure.get("kinds", {}))
        if "torch" in saved and importlib.util.find_spec("torch"):
            # The program will import torch later, as it did when it saved, and its streams
            # must not start from the beginning then.
            import torch  # noqa: F401
        live = self._kinds_now()
        problems = [
            f"stream {key} is saved from a {saved[key]}, the program has a {live[key]}"
            for key in saved.keys() & live.keys()
            if saved[key] != live[key]
        ]
        missing = sorted(live.keys() - saved.keys())
        unexpected = sorted(saved.keys() - live.keys())
        if strict:
            problems += [
                f"stream {key} is in the program, not in the checkpoint"
                for key in missing
                if key.startswith(_OWN)
            ]
            problems += [
                f"stream {key} is saved, the program has none" for key in unexpected
            ]
        shared = set(structure.get("shared", ()))
        problems += [
            f"stream {key} is shared by all ranks on one side only"
            for key in sorted(shared ^ self._shared)
            if key in saved and key in live
        ]
        raise_mismatch(self.name, sorted(problems))
        return tuple(missing), tuple(unexpected)

    def source(self, rank: int, saved: int) -> int:
        """See `RankedState`. Not collective."""
        return rank % saved

    def open_part(self, part: bytes, saved: int) -> Callable[[], None]:
        """See `RankedState`. Not collective."""
        try:
            states = _streams_in(part)
        except (*_DAMAGED, CorruptGenerationError) as error:
            raise CorruptGenerationError(f"state {self.name!r}: {error}") from error

        def take() -> None:
            wake_devices(states)
            for key, stream in self._streams().items():
                if key in states and (self._rank < saved or key in self._shared):
                    stream.set(states[key])
                elif self._rank >= saved:
                    seed = xxhash.xxh3_64_intdigest(part, seed=self._rank)
                    stream.seed(seed ^ xxhash.xxh3_64_intdigest(key.encode()))
            lost = sorted(states.keys() - self._streams().keys())
            if lost and self._rank < saved:
                logger.warning(
                    "state %r: rank %d has no such device here: %s",
                    self.name,
                    self._rank,
                    lost,
                )

        return take

    def _streams(self) -> dict[str, Stream]:
        return {**built_in_streams(), **self._own}

    def _kinds_now(self) -> dict[str, str]:
        # Without the streams of devices: their number depends on the rank, not on the
        # program.
        return {k: s.kind for k, s in self._streams().items() if not is_of_device(k)}

    def _refuse(self, rank: int, roots: dict[str, Any], theirs: dict[str, Any]) -> None:
        differing = sorted(
            key
            for key, digest in roots["shared"].items()
            if theirs["shared"].get(key) != digest
        )
        if differing and roots["kinds"] == theirs["kinds"]:
            raise DivergedError(
                f"state {self.name!r}: {differing} are declared shared by all ranks, but "
                f"differ between rank {rank} and root"
            )
        raise StageError(
            f"state {self.name!r}: rank {rank} has the streams {theirs['kinds']}, root has "
            f"{roots['kinds']}"
        )


def _streams_in(part: bytes) -> dict[str, Any]:
    """Return the streams in a part by name."""
    if not part.startswith(b"{"):
        return dict(unpack(part)["streams"])
    # The first form: a line of JSON, then each stream packed by itself.
    packed = unpack(part.partition(b"\n")[2])
    return {key: unpack(data) for key, data in packed.items()}
