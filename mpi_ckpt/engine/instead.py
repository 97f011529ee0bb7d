# SPDX-License-Identifier: Apache-2.0
"""Words what to give a manager in place of an object that is no state. Pure."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mpi_ckpt.errors import RegistrationError
from mpi_ckpt.state import State

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
