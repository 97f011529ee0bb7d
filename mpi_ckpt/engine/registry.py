# SPDX-License-Identifier: Apache-2.0
"""Keeps the states of a manager by name, and makes the ranks agree on them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from mpi_ckpt.comm import agree, compare_texts, meet, printed_by
from mpi_ckpt.errors import RegistrationError
from mpi_ckpt.leaves.digest import digest_bytes
from mpi_ckpt.state import LeafState, State
from mpi_ckpt.storage.format.layout import check_names_differ

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from mpi_ckpt.comm import Communicator, Meeting
    from mpi_ckpt.errors import CheckpointError


_MODULE = "wrap it in TrainState(module=...), with its optimizer and scheduler"
_DATA = (
    "make an ElasticSampler(len(dataset), batch_size), give it to the DataLoader as "
    "batch_sampler=, and to the manager as a state"
)
_STREAM = (
    "take RNGState(): it saves the global streams of Python, NumPy and torch, and this "
    "one with RNGState(generators={'mine': ...})"
)

# Home and name of a class -> the advice for its objects; the first that fits is given.
_ADVICE = (
    ("torch.nn", "Module", _MODULE),
    (
        "torch.optim",
        "Optimizer",
        "give it beside the module that it trains: TrainState(module=..., optimizer=...)",
    ),
    (
        "torch.optim.lr_scheduler",
        "LRScheduler",
        "give it beside its optimizer: TrainState(module=..., scheduler=..., ...)",
    ),
    (
        "torch.amp",
        "GradScaler",
        "give it beside the module: TrainState(module=..., scaler=...)",
    ),
    ("torch.utils.data", "DataLoader", _DATA),
    ("torch.utils.data", "Sampler", _DATA),
    ("torch", "Generator", _STREAM),
    ("numpy.random", "Generator", _STREAM),
    ("numpy.random", "RandomState", _STREAM),
    ("torch", "Tensor", "wrap it in ObjectState('its name', {'x': tensor})"),
    ("numpy", "ndarray", "wrap it in ArrayState('its name', {'x': array})"),
    (
        "builtins",
        "str",
        "a state is an object, not its name, and the directory is the first argument",
    ),
)


def require_state(given: Any) -> State:  # noqa: ANN401 (whatever a program passes)
    """Return a state; refuse any other object, and say what to give in its place.

    Not collective.

    Raises:
        RegistrationError: On the calling rank, if it is no state.
    """
    if isinstance(given, State):
        return given
    raise RegistrationError(
        f"{_described(given)} is not a State, so nobody knows how to save it: "
        f"{_advice_for(given)}"
    )


def require_states(given: Any) -> Any:  # noqa: ANN401 (whatever a program passes)
    """Return an iterable of states as it is; refuse a single object and a dict.

    Not collective. The single states are not looked at.

    Raises:
        RegistrationError: On the calling rank, if it is no list of states.
    """
    if isinstance(given, State):
        raise RegistrationError(
            f"states is one {type(given).__name__}: give a list of states, [state]"
        )
    if isinstance(given, Mapping) and not _is_state_dict(given):
        raise RegistrationError(
            "states is a dict: give a list of states; each has its own name, as in "
            "[TrainState(module=..., optimizer=...), RNGState()]"
        )
    is_many = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    if is_many and not _is_of_a_library(given):
        return given
    raise RegistrationError(
        f"states is {_described(given)}, not a list of states: {_advice_for(given)}"
    )


def require_names(only: Any) -> Collection[str] | None:  # noqa: ANN401 (as above)
    """Return the names of states, or None for all; refuse a single text and states.

    Not collective.

    Raises:
        RegistrationError: On the calling rank, if it is no collection of names.
    """
    if only is None:
        return None
    if isinstance(only, str):
        raise RegistrationError(
            f"only={only!r} is a text, not a list of names of states: [{only!r}]. A "
            "generation is chosen by restore(generation=...), step= or best="
        )
    if not isinstance(only, Iterable) or isinstance(only, State):
        raise RegistrationError(
            f"only is {_described(only)}, not a list of names of states"
        )
    names = list(only)
    if wrong := next((name for name in names if not isinstance(name, str)), None):
        raise RegistrationError(
            f"only has {_described(wrong)}: give names of states, such as [state.name]"
        )
    return names


def _described(given: object) -> str:
    """Return an object in a few words: a model's own text may have a thousand lines."""
    if isinstance(given, type):
        return f"the class {given.__name__}"
    if isinstance(given, str | int | float | bool | type(None)):
        return repr(given)
    name = type(given).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _advice_for(given: object) -> str:
    if isinstance(given, type):
        return f"make an object of it: {given.__name__}(...)"
    for home, name, advice in _ADVICE:
        if _is_a(given, home, name):
            return advice
    if _is_state_dict(given):
        return (
            "it looks like a state_dict(), a copy of the model at this moment: give the "
            "model itself, TrainState(module=model)"
        )
    if hasattr(given, "state_dict") and hasattr(given, "load_state_dict"):
        return "wrap it in SchedulerState('its name', ...), which uses its state_dict()"
    if isinstance(given, dict | list | tuple | set | int | float | complex | bytes):
        return "wrap it in ObjectState('its name', value), and change its .value"
    return (
        "wrap plain values in ObjectState, arrays in ArrayState, a model in TrainState, or "
        "derive its class from State"
    )


def _is_of_a_library(given: object) -> bool:
    """Return whether an iterable is itself the thing to save."""
    return any(_is_a(given, home, name) for home, name, _ in _ADVICE)


def _is_state_dict(given: object) -> bool:
    if not isinstance(given, Mapping) or not given:
        return False
    return all(_is_a(value, "torch", "Tensor") for value in given.values())


def _is_a(given: object, home: str, name: str) -> bool:
    # It can only be one if the program has imported the class; an import costs seconds.
    known: Any = getattr(sys.modules.get(home), name, None)
    return isinstance(known, type) and isinstance(given, known)


Result = TypeVar("Result")

ADVICE = (
    "a state's name must not carry a rank or the number of ranks: use one name on all "
    "ranks; what each rank has of its own goes into a PerRankState"
)

_CALLS = {
    "beginning a save": "save()",
    "beginning a sync": "sync()",
    "beginning to remember the states": "remember()",
}
"""What a program has called, where the ranks meet for it first."""


class Registry:
    """States in saving order. Not thread-safe.

    Args:
        comm: Communicator for the states.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._states: dict[str, State] = {}
        self._view = MappingProxyType(self._states)

    @property
    def names(self) -> list[str]:
        """The names, in saving order."""
        return list(self._states)

    @property
    def states(self) -> list[State]:
        """The states, in saving order."""
        return list(self._states.values())

    def add_all(self, states: Iterable[State]) -> None:
        """Add the states of a new manager.

        Collective. Main thread only.

        Raises:
            RegistrationError: On every rank, if a rank cannot add a state, or names or
                their order differ between ranks.
        """

        def add_all() -> None:
            for state in require_states(states):
                self.add(state)

        agree(self._comm, "registering states", add_all, error=RegistrationError)
        self.choose("choosing states", None, skipped=True)

    def add(self, state: State) -> None:
        """Add a state. Not collective.

        Raises:
            RegistrationError: On the calling rank, if it is no state or its name is
                taken.
        """
        require_state(state)
        check_names_differ([*self._states, state.name])
        if isinstance(state, LeafState):
            state.bind(self._comm)
            state.join(self._view)
        self._states[state.name] = state

    def remove(self, name: str) -> None:
        """Forget a state. Not collective.

        Raises:
            RegistrationError: On the calling rank, if there is no such state.
        """
        if name not in self._states:
            raise RegistrationError(f"there is no state {name!r}; {self._there()}")
        del self._states[name]

    def choose(
        self, doing: str, only: Collection[str] | None, *, skipped: bool = False
    ) -> list[State]:
        """Return the chosen states, after all ranks have agreed on the choice.

        Collective. Main thread only. Arguments and errors are those of `begin`.
        """

        def nothing_more(states: list[State]) -> list[State]:
            return states

        begun = self.begin(
            doing, only, nothing_more, error=RegistrationError, skipped=skipped
        )
        return begun.result

    def begin(
        self,
        doing: str,
        only: Collection[str] | None,
        work: Callable[[list[State]], Result],
        *,
        error: type[CheckpointError],
        skipped: bool = False,
        encode: Callable[[Result], bytes] | None = None,
    ) -> Meeting[Result]:
        """Choose states and begin work on them, the same on all ranks, in one meeting.

        Collective. Main thread only.

        Args:
            doing: The operation that begins, for errors.
            only: Names of the chosen states; None for all.
            work: Called with them on every rank; must not communicate.
            error: Class for exceptions that this package does not define.
            skipped: Whether "all" includes states with ``skip``.
            encode: Returns the part of its result that root sends to all ranks.

        Raises:
            RegistrationError: On every rank, if a name is unknown on any, or names or
                their order differ between ranks.
            CheckpointError: On every rank, if the work failed on any.
        """
        chosen: list[State] = []
        self._comm.call = _CALLS.get(doing, self._comm.call)

        def begin() -> Result:
            chosen.extend(self._pick(only, skipped=skipped))
            return work(chosen)

        def digest(_: Result) -> bytes:
            return digest_bytes(json.dumps([state.name for state in chosen]).encode())

        met = meet(self._comm, doing, begin, error=error, digest=digest, encode=encode)
        if not met.is_alike:
            self._refuse_differences([state.name for state in chosen])
        return met

    def _pick(self, only: Collection[str] | None, *, skipped: bool) -> list[State]:
        only = require_names(only)
        unknown = set(only or ()) - set(self._states)
        if unknown:
            raise RegistrationError(
                f"there are no states {sorted(unknown)}; {self._there()}"
            )
        return [
            state
            for name, state in self._states.items()
            if (name in only if only is not None else skipped or not state.skip)
        ]

    def _there(self) -> str:
        names = ", ".join(map(repr, self._states)) or "none"
        return f"the states of this manager are: {names}"

    def _refuse_differences(self, names: Sequence[str]) -> None:
        problems = compare_texts(self._comm, "comparing the states' names", names)
        lists = re.search(r" ha(?:s|ve) (.*), root has (.*)", problems[0])
        hint = f"\n{ADVICE}" if lists and _differ_in_numbers(*lists.groups()) else ""
        error = RegistrationError(
            "the ranks have different states, or another order:\n  "
            + "\n  ".join(problems)
            + hint,
            problems=problems,
        )
        raise printed_by(self._comm, error)


def numbered_alike(some: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of names that differ in numbers only, one for each of ``some``.

    Not collective. Thread-safe.

    Args:
        some: Names.
        others: Other names.
    """
    by_form: dict[str, str] = {}
    for name in others:
        by_form.setdefault(_without_numbers(name), name)
    return [
        (name, by_form[form])
        for name in some
        if (form := _without_numbers(name)) in by_form
    ]


def _differ_in_numbers(first: str, second: str) -> bool:
    return first != second and _without_numbers(first) == _without_numbers(second)


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "#", text)
