# SPDX-License-Identifier: Apache-2.0
"""Statistics summed over ranks and over restarts, with adaptdl's semantics."""

from __future__ import annotations

import base64
import copy
import json
import math
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm import collect
from mpi_ckpt.errors import CheckpointError, StageError, StateMismatchError
from mpi_ckpt.state import Arrival, Capture, PartsState, Structure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.elastic.epochs import EpochState
    from mpi_ckpt.leaf import LeafSpec

__all__ = ["Accumulator"]

Key = str | int
Totals = dict[Key, Any]


class Accumulator(PartsState, MutableMapping[Key, Any]):
    """A dictionary of sums.

    Outside of `synchronized` it takes ``accumulator[key] += value`` and ``-=``, on each
    rank by itself, and reads as empty. Inside, it holds the sums over all ranks and over
    all runs and is an ordinary dictionary, changed alike on every rank.

    A save folds what is pending on any rank into the sums, so nothing is lost with a
    job. Sums are made on root in rank order: the same every time for the same ranks.

    Args:
        initial: Sums to start from, the same on every rank.
        epochs: The loop the accumulator is used in. What `synchronized` gave is kept
            for the running epoch and given again to code that a restart runs again.
        name: As for `mpi_ckpt.State`.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal.
    """

    def __init__(
        self,
        initial: Mapping[Key, Any] | None = None,
        *,
        epochs: EpochState | None = None,
        name: str = "accumulator",
    ) -> None:
        super().__init__(name)
        self._epochs = epochs
        self._comm: Communicator | None = None
        self._results: Totals = {}
        _add_all(self._results, initial or {})
        self._updates: Totals = {}
        self._combined: Totals | None = None
        self._history: dict[int | None, list[Totals]] = {}
        self._visits: Counter[int | None] = Counter()
        self._open: Totals | None = None

    def bind(self, comm: Communicator) -> None:
        """See `LeafState`. Not collective."""
        self._comm = comm

    @contextmanager
    def synchronized(self, *, replayed: bool = True) -> Iterator[Accumulator]:
        """Sum over all ranks; within the block the accumulator holds the sums.

        Collective, unless it is replayed or nested.

        Args:
            replayed: Whether a restart within this epoch runs the block again: true
                between loops over batches, false inside one whose position is restored.

        Raises:
            CheckpointError: On every rank, if a rank's values cannot be summed, or no
                manager has the accumulator.
        """
        if self._open is not None:
            yield self
            return
        past = self._next_replay() if replayed else None
        if past is not None:
            self._updates.clear()
            self._open = past
        else:
            self._sum_over_ranks()
            if replayed:
                self._remember()
            self._open = self._results
        try:
            yield self
        finally:
            self._open = None

    def subtract(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Subtract a mapping's values from the sums. Not collective."""
        for key, value in dict(*args, **kwargs).items():
            self[key] -= value

    def update(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Add a mapping's values to the sums. Not collective."""
        for key, value in dict(*args, **kwargs).items():
            self[key] += value

    def __getitem__(self, key: Key) -> Any:  # noqa: ANN401
        if self._open is not None:
            return self._open[key]
        return _Update(key)

    def __setitem__(self, key: Key, value: Any) -> None:  # noqa: ANN401
        if self._open is not None:
            self._open[key] = _plain(key, value)
            return
        # `a[k] += v` reads an _Update, adds v to it and stores it here.
        if not isinstance(value, _Update) or value.key != key:
            raise TypeError(
                f"{self.name}[{key!r}] can only be added to outside of synchronized()"
            )
        _add_all(self._updates, {key: value.amount})

    def __delitem__(self, key: Key) -> None:
        del self._visible()[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._visible())

    def __len__(self) -> int:
        return len(self._visible())

    def __contains__(self, key: object) -> bool:
        return key in self._visible()

    def part(self) -> bytes:
        """See `PartsState`. Not collective."""
        return _encode(self._updates)

    def combine(self, parts: Sequence[bytes]) -> None:
        """See `PartsState`. Root only."""
        totals = dict(self._results)
        for part in parts:
            _add_all(totals, _decode(part))
        self._combined = totals

    def combined(self) -> None:
        """See `PartsState`. Not collective."""
        if self._combined is not None:
            self._results, self._combined = self._combined, None
        self._updates.clear()

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        history = [
            [epoch, [_to_json(totals) for totals in entries]]
            for epoch, entries in self._history.items()
        ]
        return Capture({"results": _to_json(self._results), "history": history}, ())

    def prepare(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],  # noqa: ARG002
        *,
        strict: bool,  # noqa: ARG002
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        try:
            results, history = _parse(structure)
        except (TypeError, ValueError, KeyError) as error:
            raise StateMismatchError(
                f"state {self.name!r} was not saved from an accumulator"
            ) from error

        def adopt() -> None:
            self._results, self._history = results, history
            self._updates.clear()

        return Arrival((), adopt)

    def _visible(self) -> Totals:
        return {} if self._open is None else self._open

    def _epoch(self) -> int | None:
        return None if self._epochs is None else self._epochs.current

    def _next_replay(self) -> Totals | None:
        epoch = self._epoch()
        # Finished epochs are never run again.
        self._history = {
            key: entries
            for key, entries in self._history.items()
            if key is None or epoch is None or key >= epoch
        }
        visit = self._visits[epoch]
        self._visits[epoch] += 1
        entries = self._history.get(epoch, [])
        # A copy: the block may change it, and a later restart replays it once more.
        return copy.deepcopy(entries[visit]) if visit < len(entries) else None

    def _remember(self) -> None:
        entries = self._history.setdefault(self._epoch(), [])
        entries.append(copy.deepcopy(self._results))

    def _sum_over_ranks(self) -> None:
        comm = self._comm
        if comm is None:
            raise CheckpointError(
                f"accumulator {self.name!r} belongs to no manager yet: give it to one "
                "among its states"
            )

        def combine(parts: list[bytes]) -> list[Any]:
            self.combine(parts)
            return _to_json(self._combined or {})

        totals = collect(
            comm,
            f"summing accumulator {self.name!r}",
            self.part,
            combine,
            error=StageError,
            safe="nothing was added",
        )
        self._combined = self._combined if comm.is_root else _from_json(totals)
        self.combined()


class _Update:
    """Stands for an entry that is being added to."""

    __slots__ = ("amount", "key")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.amount: Any = 0

    def __add__(self, value: Any) -> _Update:  # noqa: ANN401
        self.amount = self.amount + _plain(self.key, value)
        return self

    def __sub__(self, value: Any) -> _Update:  # noqa: ANN401
        self.amount = self.amount - _plain(self.key, value)
        return self


def _parse(structure: Structure) -> tuple[Totals, dict[int | None, list[Totals]]]:
    history = {
        epoch: [_from_json(totals) for totals in entries]
        for epoch, entries in structure["history"]
    }
    return _from_json(structure["results"]), history


def _plain(key: object, value: Any) -> Any:  # noqa: ANN401
    """Return an int, float or array for anything number-like, tensors included."""
    if not isinstance(key, (str, int)):
        raise TypeError(f"key {key!r}: an accumulator's keys are text or integers")
    if isinstance(value, _Update):
        raise TypeError("an accumulator's entries can only be read inside synchronized()")
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        value = value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return value
    if isinstance(value, (int, float)):
        return value
    raise TypeError(
        f"accumulator[{key!r}]: {type(value).__name__} is no number or array of them"
    )


def _add_all(totals: Totals, updates: Mapping[Key, Any]) -> None:
    for key, value in updates.items():
        amount = _plain(key, value)
        totals[key] = totals[key] + amount if key in totals else amount


def _to_json(totals: Totals) -> list[Any]:
    return [[key, _value_to_json(value)] for key, value in totals.items()]


def _value_to_json(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"array": data, "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}  # JSON has no NaN, and a loss may well be one
    return value


def _from_json(pairs: Any) -> Totals:  # noqa: ANN401 (JSON)
    return {key: _value_from_json(value) for key, value in pairs}


def _value_from_json(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    array = np.frombuffer(base64.b64decode(value["array"]), np.dtype(value["dtype"]))
    return array.reshape(value["shape"]).copy()


def _encode(totals: Totals) -> bytes:
    return json.dumps(_to_json(totals)).encode()


def _decode(data: bytes) -> Totals:
    return _from_json(json.loads(data))
