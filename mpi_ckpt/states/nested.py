# SPDX-License-Identifier: Apache-2.0
"""Defines states whose contents are one nested value: objects and schedulers."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Protocol

from mpi_ckpt.errors import RegistrationError, StageError, StateMismatchError
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure
from mpi_ckpt.states.buffers.array_bytes import ReadonlyMemory
from mpi_ckpt.states.leaf_values import KIND, make_value, refuse_attributes, takes_bytes
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.tree import check_structure, flatten, leaf_nodes, unflatten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi_ckpt.leaves.leaf import Leaf, LeafSpec
    from mpi_ckpt.state import SyncMode

__all__ = [
    "NestedState",
    "ObjectState",
    "SchedulerState",
    "Stateful",
    "is_off",
    "is_stateful",
]


class NestedState(LeafState):
    """A leaf state whose contents are a nested value.

    Tensors that the program already has, with the same name, dtype and shape, are restored
    in place; others are made.
    """

    def nested(self) -> Any:  # noqa: ANN401 (any nested value)
        """Return the live contents, by reference. Not collective."""
        raise NotImplementedError

    def accept(self, value: Any) -> None:  # noqa: ANN401 (any nested value)
        """Take over the arrived contents. Not collective."""
        raise NotImplementedError

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:
        """Raise StateMismatchError if contents of this form do not fit. Not collective."""

    def device_of(self, leaf: str) -> Any:  # noqa: ANN401, ARG002 (a torch device)
        """Return the device of a new tensor for a leaf; None for the saved kind.

        Not collective.
        """
        return None

    def like(self, spec: LeafSpec) -> Any:  # noqa: ANN401, ARG002 (a DTensor)
        """Return the DTensor over whose mesh a new tensor for a leaf is cut, if any.

        Not collective.
        """
        return None

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        return flatten(self.nested()).capture()

    def prepare(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],
        *,
        strict: bool,  # noqa: ARG002
    ) -> Arrival:
        """See `LeafState`; saved contents are taken over as a whole. Not collective."""
        self.check(structure, specs)
        # Refuse a structure of unknown form now, not after leaves have arrived.
        check_structure(structure, specs)
        live, memory = flatten(self.nested()), ReadonlyMemory()
        nodes = leaf_nodes(structure)
        arriving: dict[str, Any] = {}

        def make(spec: LeafSpec) -> Leaf:
            node, device = nodes.get(spec.name, {}), self.device_of(spec.name)
            arriving[spec.name], leaf = make_value(spec, node, device, self.like(spec))
            return leaf

        targets = []
        for spec in specs:
            leaf, value = live.leaves.get(spec.name), live.values.get(spec.name)
            if (
                leaf is None
                or leaf.spec != spec
                or not _is_alike(live.nodes[spec.name], nodes.get(spec.name, {}))
                or not takes_bytes(value, memory)
            ):
                leaf = make(spec)
            else:
                arriving[spec.name] = value
            targets.append(leaf)
        return Arrival(
            targets,
            lambda: self.accept(unflatten(structure, arriving)),
            elsewhere=lambda index: make(specs[index]),
        )


def _is_alike(live: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Return whether a live value is of the saved kind, on any device."""
    if live == saved:
        return True
    return {**live, "device": None} == {**saved, "device": None}


_PICKLED = "pickled"


class ObjectState(NestedState):
    """A Python value, saved as JSON, with its tensors and arrays as leaves.

    Args:
        name: As for `mpi_ckpt.State`.
        value: None, numbers, text, bytes, tensors, arrays, and lists, tuples, sets and
            dicts of them.
        pickle: Save any picklable value instead, and allow unpickling **for this state**:
            anyone who can write to the checkpoint directory can then run code in your job.
        sync: As for `LeafState`; by default a save refuses replicas that differ, since it
            would lose a rank's value without an error.

    Attributes:
        value: The live value. Assign to it freely between saves.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal.
    """

    def __init__(
        self,
        name: str,
        value: Any = None,  # noqa: ANN401 (any nested value)
        *,
        pickle: bool = False,
        sync: SyncMode = "check",
    ) -> None:
        super().__init__(name, sync=sync)
        self.value = value
        self._pickle = pickle

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        flattened = flatten(self.nested())
        refuse_attributes(flattened.values)
        captured = flattened.capture()
        if not self._pickle and _is_pickled(captured.structure):
            raise StageError(
                f"state {self.name!r}: a value with nothing but bytes under the key "
                f"{_PICKLED!r} would be taken for a pickled one: rename the key"
            )
        return captured

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        if not self._pickle:
            return self.value
        try:
            return {_PICKLED: pickle.dumps(self.value, protocol=5)}
        except Exception as error:
            raise StageError(f"state {self.name!r} cannot be pickled: {error}") from error

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:  # noqa: ARG002
        """See `NestedState`. Not collective."""
        if _is_pickled(structure) != self._pickle:
            was, now = ("with", "without") if not self._pickle else ("without", "with")
            raise StateMismatchError(
                f"state {self.name!r} was saved {was} pickle=True and is made {now} it"
            )

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        if self._pickle:
            # The user opted in for this state, by name.
            value = pickle.loads(value[_PICKLED])  # noqa: S301
        self.value = value


def _is_pickled(structure: Structure) -> bool:
    inner = structure.get(_PICKLED) if isinstance(structure, dict) else None
    return isinstance(inner, dict) and len(structure) == 1 and inner.get(KIND) == "bytes"


class Stateful(Protocol):
    """Any object that a `SchedulerState` can hold, also a gradient scaler or data loader.

    Not collective: neither method may communicate.
    """

    def state_dict(self) -> Any:  # noqa: ANN401
        """Return the state as nested plain values and tensors."""

    def load_state_dict(self, state_dict: Any, /) -> Any:  # noqa: ANN401
        """Take over a result of `state_dict`."""


class SchedulerState(NestedState):
    """A learning-rate scheduler, or anything else with a state dict of plain values.

    Args:
        name: As for `mpi_ckpt.State`.
        scheduler: Its ``state_dict()`` holds plain values, tensors and arrays only. Its
            class is the same as when it was saved.
        sync: As for `LeafState`.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal, or
            it has no such methods.
    """

    def __init__(self, name: str, scheduler: Stateful, *, sync: SyncMode = "root") -> None:
        super().__init__(name, sync=sync)
        if isinstance(scheduler, type):
            raise RegistrationError(
                f"state {name!r}: {scheduler.__name__} is a class: give an object of it"
            )
        if not is_stateful(scheduler):
            raise RegistrationError(
                f"state {name!r}: a {type(scheduler).__name__} has no state_dict() and "
                "load_state_dict(): if it is what state_dict() gave, give the object "
                "itself; for plain values take an ObjectState, or a State of your own"
            )
        self._scheduler = scheduler

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        return {
            "class": type(self._scheduler).__name__,
            "off": is_off(self._scheduler),
            "content": self._scheduler.state_dict(),
        }

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:  # noqa: ARG002
        """See `NestedState`. Not collective."""
        if not isinstance(structure, dict) or not {"class", "content"} <= set(structure):
            raise StateMismatchError(
                f"state {self.name!r} was not saved from a scheduler or the like"
            )
        saved, live = structure["class"], type(self._scheduler).__name__
        problems = []
        if saved != live:
            problems.append(f"it was saved from a {saved}, the program has a {live}")
        was_off, now_off = bool(structure.get("off")), is_off(self._scheduler)
        if was_off != now_off:
            modes = ["enabled", "switched off"]
            problems.append(
                f"the {live} was {modes[was_off]} when it was saved, "
                f"and is {modes[now_off]}"
            )
        raise_mismatch(self.name, problems)

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        self._scheduler.load_state_dict(value["content"])


def is_stateful(value: object) -> bool:
    """Return whether a value has ``state_dict()`` and ``load_state_dict()``.

    Not collective.
    """
    methods = ("state_dict", "load_state_dict")
    return all(callable(getattr(value, method, None)) for method in methods)


def is_off(value: object) -> bool:
    """Return whether an object is switched off, as a gradient scaler can be.

    Not collective. Such an object has nothing to save or restore.
    """
    asked = getattr(value, "is_enabled", None)
    return callable(asked) and not asked()
