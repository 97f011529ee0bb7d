# SPDX-License-Identifier: Apache-2.0
"""Sums statistics over ranks and over restarts, with adaptdl's semantics."""

from __future__ import annotations

import base64
import copy
import logging
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_ckpt.comm import any_of, collect
from mpi_ckpt.errors import (
    CheckpointError,
    RegistrationError,
    StageError,
    StateMismatchError,
)
from mpi_ckpt.state import Arrival, Capture, PartsState, Structure
from mpi_ckpt.states.packed import make_values, pack, unpack
from mpi_ckpt.states.tree import flatten, unflatten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.elastic.epochs import EpochState
    from mpi_ckpt.leaves.leaf import LeafSpec

__all__ = ["Accumulator"]

logger = logging.getLogger(__name__)


Key = str | int
Totals = dict[Key, Any]

_KINDS = "biufc"
_WIDER: dict[Any, Any] = {np.dtype(kind): np.int64 for kind in "?bBhHiI"}
_WIDER[np.dtype(np.float16)] = np.float32


class Update:
    """A placeholder for an entry during ``+=``.

    Args:
        key: Of the entry. Attributes:
        key: The same.
        amount: The sum of the added values so far.
    """

    __slots__ = ("amount", "key")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.amount: Any = 0

    def __add__(self, value: Any) -> Update:  # noqa: ANN401
        self.amount = exactly(np.add, self.amount, as_number(self.key, value))
        return self

    def __sub__(self, value: Any) -> Update:  # noqa: ANN401
        self.amount = exactly(np.subtract, self.amount, as_number(self.key, value))
        return self


def as_number(key: object, value: Any) -> Any:  # noqa: ANN401
    """Return a number or an array of numbers for any such value, tensors included.

    Not collective. Thread-safe. Types in which a sum would lose precision, such as those of
    8 and 16 bits that NumPy lacks, become float32, which holds each of their values
    exactly.

    Args:
        key: Key of its entry.
        value: A number or an array or tensor of any number of them.

    Raises:
        TypeError: On the calling rank, if it is no number, or the key is neither text nor
            an integer.
    """
    if not isinstance(key, (str, int)):
        raise TypeError(f"key {key!r}: an accumulator's keys are text or integers")
    if isinstance(value, Update):
        raise TypeError("an accumulator's entries can only be read inside synchronized()")
    if hasattr(value, "detach"):
        value = _array_of(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.isbuiltin == 2:
        value = value.astype(np.float32)  # of other packages, as ml_dtypes' bfloat16
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        value = value.item()
    # A subclass holds more than numbers: a sum would lose a unit or a mask.
    if type(value) in (np.ndarray, np.memmap) and value.dtype.kind in _KINDS:
        return value
    if isinstance(value, (int, float, complex, np.longdouble, np.clongdouble)):
        return value
    raise TypeError(
        f"accumulator[{key!r}]: {type(value).__name__} is not a number or an array of "
        "numbers"
    )


def add_all(totals: Totals, updates: Mapping[Key, Any]) -> None:
    """Add amounts to sums, in place; an existing array is not modified.

    Not collective.

    Args:
        totals: The sums.
        updates: The amounts.

    Raises:
        TypeError: On the calling rank, if an amount is not a number.
        ValueError: On the calling rank, if shapes do not match.
    """
    for key, value in updates.items():
        amount = as_number(key, value)
        totals[key] = exactly(np.add, totals[key], amount) if key in totals else amount


def exactly(how: np.ufunc, total: Any, amount: Any) -> Any:  # noqa: ANN401
    """Add or subtract numbers or arrays, in a wider type if theirs is too narrow.

    Not collective. Thread-safe. NumPy keeps the type of arrays: counts of 8 bits start
    anew at 256, and those in float16 stand still at 2048.

    Args:
        how: ``np.add`` or ``np.subtract``.
        total: The first.
        amount: The second.
    """
    narrow = np.result_type(total, amount) if _has_array(total, amount) else None
    wide = _WIDER.get(narrow)
    if wide is None:
        return total + amount if how is np.add else total - amount
    exact = how(total, amount, dtype=wide)
    with np.errstate(over="ignore"):
        found = exact.astype(narrow)
    is_exact = np.array_equal(found, exact, equal_nan=exact.dtype.kind == "f")
    return found if is_exact else exact


def _own(key: object, value: Any) -> Any:  # noqa: ANN401
    """Return a number, or an array with memory of its own."""
    return copy.copy(as_number(key, value))


def _has_array(*values: Any) -> bool:  # noqa: ANN401
    return any(isinstance(value, np.ndarray) for value in values)


def from_first_form(pairs: Any) -> Totals:  # noqa: ANN401 (JSON)
    """Read sums in the old form, with arrays within the JSON. Not collective.

    Raises:
        TypeError, ValueError, KeyError: On the calling rank, if they have another form.
    """
    return {key: _from_json(value) for key, value in pairs}


def _from_json(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    array = np.frombuffer(base64.b64decode(value["array"]), np.dtype(value["dtype"]))
    return array.reshape(value["shape"]).copy()


def _array_of(tensor: Any) -> Any:  # noqa: ANN401
    # NumPy has no views that conjugate or negate when they are read.
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        return tensor.numpy()
    except TypeError:
        # NumPy lacks bfloat16, 8-bit floats and complex numbers of two halves.
        return (tensor.cfloat() if tensor.is_complex() else tensor.float()).numpy()


_REMEMBERED_MAX = 1000
"""Results of one epoch: each is saved with every save from there on."""


class Accumulator(PartsState, MutableMapping[Key, Any]):
    """A dictionary of sums.

    Outside of `synchronized`, each rank by itself may use ``accumulator[key] += value`` and
    ``-=``, or ``accumulator += {key: value}`` and ``-=``; the accumulator reads as empty.
    Inside, it is an ordinary dictionary of the sums over all ranks and all runs; every rank
    must change it alike. Values are integers, floats of any width and complex numbers, or
    arrays or tensors of them.

    A save adds the pending values of all ranks to the sums, so a lost job loses none of
    them. Root adds in rank order: the result is the same each time for the same ranks.

    Args:
        initial: Sums to start from, the same on every rank.
        epochs: The loop that uses the accumulator. Results of `synchronized` in the running
            epoch are kept, and replayed to code that a restart runs again. Without it, as
            in a loop over steps, nothing is replayed.
        name: As for `mpi_ckpt.State`.

    Raises:
        RegistrationError: On every rank that makes it, if the name is illegal, or sums to
            start from are no dict.
    """

    def __init__(
        self,
        initial: Mapping[Key, Any] | None = None,
        *,
        epochs: EpochState | None = None,
        name: str = "accumulator",
    ) -> None:
        super().__init__(name)
        if initial is not None and not isinstance(initial, Mapping):
            raise RegistrationError(
                f"an accumulator begins with {initial!r}: give a dict of sums, or none; "
                "its name is given by name="
            )
        self._epochs = epochs
        self._comm: Communicator | None = None
        self._results: Totals = {}
        # Copies: the program goes on to change its own arrays and tensors.
        add_all(self._results, {k: _own(k, value) for k, value in (initial or {}).items()})
        self._updates: Totals = {}
        self._combined: Totals | None = None
        # Results of synchronized() in one epoch, in order; None after too many.
        self._history: list[Totals] | None = []
        self._history_epoch: int | None = None
        self._visits = 0
        self._entered = 0
        self._open: Totals | None = None

    def bind(self, comm: Communicator) -> None:
        """See `LeafState`. Not collective."""
        self._comm = comm

    @contextmanager
    def synchronized(self, *, replayed: bool = True) -> Iterator[Accumulator]:
        """Sum over all ranks; within the block the accumulator holds the sums.

        Collective, unless it is nested. If an `EpochState` shows that a restart runs the
        epoch again, it replays its earlier results and drops values added since. It does
        not replay outside of that loop, nor within the batches of an `ElasticSampler` of
        the same manager, where a run goes on after the last batch.

        Args:
            replayed: False if the program itself restores its place in the epoch, and does
                not run the block again.

        Raises:
            CheckpointError: On every rank, if a rank's values cannot be summed, or no
                manager has the accumulator.
        """
        if self._open is not None:
            yield self
            return
        replayed = replayed and self._is_repeatable()
        past = self._next_replay() if replayed else None
        if past is not None:
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

    def __iadd__(self, other: Mapping[Key, Any]) -> Accumulator:
        self.update(other)
        return self

    def __isub__(self, other: Mapping[Key, Any]) -> Accumulator:
        self.subtract(other)
        return self

    def __getitem__(self, key: Key) -> Any:  # noqa: ANN401
        if self._open is not None:
            return self._open[key]
        return Update(key)

    def __setitem__(self, key: Key, value: Any) -> None:  # noqa: ANN401
        if self._open is not None:
            self._open[key] = _own(key, value)
            return
        # `a[k] += v` reads an Update, adds v to it and stores it here.
        if not isinstance(value, Update) or value.key != key:
            raise TypeError(
                f"{self.name}[{key!r}] can only be added to outside of synchronized()"
            )
        add_all(self._updates, {key: value.amount})

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
        return pack(self._updates)

    def combine(self, parts: Sequence[bytes]) -> None:
        """See `PartsState`. Root only."""
        totals = dict(self._results)
        for part in parts:
            add_all(totals, unpack(part))
        self._combined = totals

    def combined(self) -> None:
        """See `PartsState`. Not collective."""
        if self._combined is not None:
            self._results, self._combined = self._combined, None
        self._updates.clear()

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        content = {
            "results": self._results,
            "epoch": self._history_epoch,
            # As one leaf: hundreds of small results would be as many leaves.
            "history": pack(self._history) if self._history != [] else None,
        }
        return flatten(content).capture()

    def prepare(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],
        *,
        strict: bool,  # noqa: ARG002
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        try:
            if isinstance(structure, dict) and isinstance(structure["history"], list):
                first = _of_first_form(structure)
                return Arrival((), lambda: self._take(*first))
            expected = unflatten(structure, {spec.name: spec for spec in specs})
            if sorted(expected) != ["epoch", "history", "results"]:
                raise ValueError
            expected["results"].items()
        except (TypeError, ValueError, KeyError, AttributeError, CheckpointError) as error:
            raise StateMismatchError(
                f"state {self.name!r} was not saved from an accumulator"
            ) from error
        # Make new arrays: the program may hold those that it has read here.
        values, leaves = make_values(structure, specs)

        def adopt() -> None:
            content = unflatten(structure, values)
            history = [] if content["history"] is None else unpack(content["history"])
            self._take(content["results"], content["epoch"], history)

        return Arrival(leaves, adopt)

    def _take(
        self, results: Totals, epoch: int | None, history: list[Totals] | None
    ) -> None:
        self._results, self._history_epoch, self._history = results, epoch, history
        self._updates.clear()

    def _visible(self) -> Totals:
        return {} if self._open is None else self._open

    def _bound(self) -> Communicator:
        if self._comm is None:
            raise CheckpointError(
                f"accumulator {self.name!r} belongs to no manager yet: pass it to a "
                "manager as a state"
            )
        return self._comm

    def _is_repeatable(self) -> bool:
        epochs = self._epochs
        if epochs is None or epochs.current is None:
            return False
        doing = f"looking where accumulator {self.name!r} is summed"
        # Python decides on each rank by itself whether an iteration has ended.
        (unrepeatable,) = any_of(self._bound(), doing, not epochs.is_repeatable)
        return not unrepeatable

    def _next_replay(self) -> Totals | None:
        epochs = self._epochs
        assert epochs is not None
        if self._history_epoch != epochs.current:
            # Finished epochs are never run again.
            self._history_epoch, self._history = epochs.current, []
        if self._entered != epochs.entered:
            self._entered, self._visits = epochs.entered, 0
        visit, history = self._visits, self._history
        self._visits += 1
        if history is None or visit >= len(history):
            return None
        if self._updates and visit == 0 and self._bound().is_root:
            logger.warning(
                "accumulator %r: epoch %d is run again, so synchronized() returns its sums "
                "from before the restart, without the values added since; if the program "
                "itself resumes in mid-epoch, call synchronized(replayed=False)",
                *(self.name, epochs.current),
            )
        self._updates.clear()
        # A copy: the block may change it, and a later restart replays it once more.
        return copy.deepcopy(history[visit])

    def _remember(self) -> None:
        if self._history is None:
            return
        if len(self._history) < _REMEMBERED_MAX:
            self._history.append(copy.deepcopy(self._results))
            return
        self._history = None
        if self._bound().is_root:
            logger.warning(
                "accumulator %r: synchronized() was called more than %d times in epoch %s: "
                "if a restart runs this epoch again, its sums contain repeated values "
                "twice; if the program resumes in mid-epoch, call "
                "synchronized(replayed=False)",
                *(self.name, _REMEMBERED_MAX, self._history_epoch),
            )

    def _sum_over_ranks(self) -> None:
        comm = self._bound()

        def combine(parts: list[bytes]) -> str:
            self.combine(parts)
            return base64.b64encode(pack(self._combined)).decode()

        totals = collect(
            comm,
            f"summing accumulator {self.name!r}",
            self.part,
            combine,
            error=StageError,
            safe="nothing was added",
        )
        if not comm.is_root:
            self._combined = unpack(base64.b64decode(totals))
        self.combined()


def _of_first_form(structure: Structure) -> tuple[Totals, int | None, list[Totals]]:
    """Read sums of a release that kept arrays and history within the JSON."""
    epoch, history = None, []
    for number, entries in structure["history"]:
        if number is not None and (epoch is None or number > epoch):
            epoch, history = number, [from_first_form(totals) for totals in entries]
    return from_first_form(structure["results"]), epoch, history
