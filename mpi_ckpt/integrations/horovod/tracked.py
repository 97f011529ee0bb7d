# SPDX-License-Identifier: Apache-2.0
"""Turns the attributes of an elastic state into states that a manager saves."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import RegistrationError, StageError
from mpi_ckpt.integrations.horovod.elastic_sampler import HorovodSampler
from mpi_ckpt.state import State
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.module import ModuleState
from mpi_ckpt.states.nested import NestedState, SchedulerState
from mpi_ckpt.states.optimizer import OptimizerState
from mpi_ckpt.states.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.state import Structure

_VALUES = ".attributes"
_ORDER = (ModuleState, OptimizerState)
"""A module comes before the optimizer over it, that before what sets its rates."""


class Tracked:
    """The saved attributes of an object: those without a leading underscore.

    Not collective. Main thread only.

    Args:
        owner: The object.

    Attributes:
        declared: Names of the attributes that the program has from the start.
    """

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._states: dict[str, tuple[Any, State]] = {}
        self._homes: dict[str, Any] = {}
        self._values = _ValuesState(owner, self)
        self.declared: frozenset[str] = frozenset()

    def check(self, name: str, value: Any) -> None:  # noqa: ANN401 (any value)
        """Refuse a value that cannot be saved.

        Raises:
            RegistrationError: On the calling rank.
        """
        if _make_state(name, value) is not None:
            return
        try:
            flatten(value, name)
        except StageError as error:
            raise RegistrationError(
                f"attribute {name!r} would be tracked, but cannot be saved: {error}. If it "
                "need not be saved, keep it in a variable outside of the state, or in an "
                "attribute whose name begins with an underscore"
            ) from error

    def states(self) -> list[State]:
        """Return the present states; unchanged attributes keep theirs."""
        known, self._states = self._states, {}
        homes, self._homes = self._homes, {}
        attributes = tracked_of(self._owner)
        for name, value in attributes.items():
            home = self._homes[name] = _home_of(value, attributes)
            before = known.get(name)
            if before is not None and before[0] is value and homes.get(name) is home:
                self._states[name] = before
                continue
            made = _make_state(name, value, home)
            if made is not None:
                self._states[name] = (value, made)
        # By name within a kind: ranks may set their attributes in different orders.
        made_states = [state for _, (_, state) in sorted(self._states.items())]
        return [*sorted(made_states, key=_place_of), self._values]

    def plain(self) -> dict[str, Any]:
        """Return the attributes that are plain values."""
        known = {name for name, (value, _) in self._states.items()}
        return {n: v for n, v in sorted(tracked_of(self._owner).items()) if n not in known}

    def place(self, ranks: MPI.Intracomm) -> None:
        """Make the samplers divide the rest of the epoch among the present ranks."""
        for value in tracked_of(self._owner).values():
            if isinstance(value, HorovodSampler):
                value.reset()
                value.place(ranks.rank, ranks.size)

    def describe(self) -> list[str]:
        """Return the properties that all ranks must have in common, as text."""
        self.states()
        kinds = {name: type(value).__name__ for name, (value, _) in self._states.items()}
        kinds |= dict.fromkeys(self.plain(), "value")
        return [f"{name} ({kind})" for name, kind in sorted(kinds.items())]


def tracked_of(owner: object) -> dict[str, Any]:
    """Return the attributes of an object that are tracked. Not collective."""
    return {name: value for name, value in vars(owner).items() if not name.startswith("_")}


class _ValuesState(NestedState):
    """The plain values among the attributes of an object."""

    def __init__(self, owner: object, tracked: Tracked) -> None:
        super().__init__(_VALUES)
        self._owner = owner
        self._tracked = tracked

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        return self._tracked.plain()

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:  # noqa: ARG002
        """See `NestedState`. Not collective."""
        if not isinstance(structure, dict):
            raise_mismatch(self.name, ["it holds no attributes"])

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        # Attributes added since the commit are removed as well. But an attribute that the
        # program has from the start may be new in this version of it, and missing in the
        # saved state.
        for name in set(self._tracked.plain()) - set(value) - self._tracked.declared:
            delattr(self._owner, name)
        for name, attribute in value.items():
            setattr(self._owner, name, attribute)


class _SamplerState(NestedState):
    """Position of a sampler, and the values that its order depends on."""

    def __init__(self, name: str, sampler: HorovodSampler) -> None:
        super().__init__(name)
        self._sampler = sampler

    def bind(self, comm: Communicator) -> None:
        """See `LeafState`. Not collective."""
        self._sampler.place(comm.rank, comm.size)

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        return {**self._identity(), **self._sampler.state_dict()}

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:  # noqa: ARG002
        """See `NestedState`. Not collective."""
        saved = structure if isinstance(structure, dict) else {}
        problems = [
            f"{key} is saved as {saved.get(key)}, the program has {value}"
            for key, value in self._identity().items()
            if saved.get(key) != value
        ]
        raise_mismatch(self.name, problems)

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        self._sampler.load_state_dict(value)

    def _identity(self) -> dict[str, int | bool]:
        sampler = self._sampler
        return {
            "length": len(sampler.dataset),
            "shuffle": sampler.shuffle,
            "seed": sampler.seed,
        }


def _home_of(value: Any, attributes: dict[str, Any]) -> Any:  # noqa: ANN401
    """Return the module that names the parameters of an optimizer, if it is tracked.

    Without their names, parameters in another order would get each other's state.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.optim.Optimizer):
        return None
    params = {id(param) for group in value.param_groups for param in group["params"]}
    modules = [attributes[name] for name in sorted(attributes)]
    modules = [module for module in modules if isinstance(module, torch.nn.Module)]
    own = [m for m in modules if not params.isdisjoint(map(id, m.parameters()))]
    return own[0] if own else None


def _make_state(
    name: str,
    value: Any,  # noqa: ANN401 (any value)
    home: Any = None,  # noqa: ANN401 (a module)
) -> State | None:
    """Return a state for a value that is not plain; None for a plain value."""
    if isinstance(value, State):
        return value
    if isinstance(value, HorovodSampler):
        return _SamplerState(name, value)
    # A module or an optimizer can only be here if torch was imported.
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        return ModuleState(name, value)
    if torch is not None and isinstance(value, torch.optim.Optimizer):
        return OptimizerState(name, value, module=home)
    methods = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    if not isinstance(value, type) and all(callable(method) for method in methods):
        return SchedulerState(name, value)
    return None


def _place_of(state: State) -> int:
    kinds = [i for i, kind in enumerate(_ORDER) if isinstance(state, kind)]
    return kinds[0] if kinds else len(_ORDER)
