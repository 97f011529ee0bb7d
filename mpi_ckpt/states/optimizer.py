# SPDX-License-Identifier: Apache-2.0
"""Saves and restores a torch optimizer, dealt out or whole, without ever taking a step."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import RegistrationError, StageError
from mpi_ckpt.state import Arrival, Capture, Change
from mpi_ckpt.states.buffers.array_bytes import ReadonlyMemory
from mpi_ckpt.states.leaf_values import (
    is_leaf_value,
    make_value,
    memory_leaf,
    single_tile,
    takes_bytes,
)
from mpi_ckpt.states.nested import NestedState, is_stateful
from mpi_ckpt.states.optimizer_params import (
    OWNED,
    STATE,
    SavedParams,
    describe_params,
    entries_of,
    with_entries,
)
from mpi_ckpt.states.stages import is_stage, named_contents, named_leaves
from mpi_ckpt.states.tree import check_structure, flatten, leaf_nodes, unflatten
from mpi_ckpt.states.wrappers import is_dtensor, parameter_names, tied_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaves.leaf import Gate, Leaf, LeafSpec
    from mpi_ckpt.state import Structure, SyncMode
    from mpi_ckpt.states.kept_leaves import KeptOptimizer
    from mpi_ckpt.states.optimizer_params import Names, Shapes

__all__ = ["OptimizerState", "is_optimizer"]


_HOME = "torch.distributed.optim.zero_redundancy_optimizer"


def is_dealt_out(optimizer: object) -> bool:
    """Return whether an optimizer is a ZeroRedundancyOptimizer. Not collective."""
    # It can only be one if the program has imported the class; an import costs seconds.
    known: Any = getattr(sys.modules.get(_HOME), "ZeroRedundancyOptimizer", None)
    return known is not None and isinstance(optimizer, known)


class OwnedState:
    """The state of the parameters that this rank owns.

    Not collective.

    Args:
        optimizer: A ZeroRedundancyOptimizer.
    """

    def __init__(self, optimizer: Any) -> None:  # noqa: ANN401
        self._optimizer = optimizer

    @property
    def class_name(self) -> str:
        """Name of the class of the inner optimizer, whose state it is."""
        return type(self._inner).__name__

    def groups(self) -> dict[str, Any]:
        """Return the state dict of the outer optimizer, without the state of parameters."""
        import torch

        outer: dict[str, Any] = torch.optim.Optimizer.state_dict(self._optimizer)
        return {**outer, "state": {}}

    def leaves(self) -> list[Leaf]:
        """Return the state of the owned parameters as leaves.

        Raises:
            StageError: On the calling rank, if an entry is no tensor.
        """
        return [
            single_tile(memory_leaf(f"{STATE}{index}/{key}", value))
            for index, param in self._owned().items()
            for key, value in self._entry(index, param).items()
        ]

    def targets(
        self,
        structure: Structure,
        specs: Sequence[LeafSpec],
        device_of: Callable[[str], Any],
    ) -> tuple[list[Leaf | None], Callable[[], None]]:
        """Return the destinations of saved state, and a function that takes it over.

        Args:
            structure: The saved structure, with the entries of all parameters.
            specs: The saved leaves of their state.
            device_of: Returns the device of a new tensor for a leaf.

        Returns:
            For each leaf a single tile if this rank owns its parameter, else None; and the
            function.

        Raises:
            StateMismatchError: On the calling rank, if the structure has no such form, or a
                value cannot be made.
        """
        entries = entries_of(structure)
        check_structure([entry for _, entry in entries], specs)
        owned, nodes = self._owned(), leaf_nodes([entry for _, entry in entries])
        memory = ReadonlyMemory()
        arriving: dict[str, Any] = {}
        leaves: list[Leaf | None] = []
        for spec in specs:
            index, _, key = spec.name.removeprefix(STATE).partition("/")
            param = owned.get(int(index)) if index.isdecimal() else None
            if param is None:
                leaves.append(None)
                continue
            live = self._inner.state.get(param, {}).get(key)
            leaf = memory_leaf(spec.name, live) if is_leaf_value(live) else None
            if leaf is None or leaf.spec != spec or not takes_bytes(live, memory):
                node = nodes.get(spec.name, {})
                live, leaf = make_value(spec, node, device_of(spec.name))
            arriving[spec.name] = live
            leaves.append(single_tile(leaf))

        def take() -> None:
            state = self._inner.state
            state.clear()
            for index, entry in entries:
                if index in owned:
                    state[owned[index]] = unflatten(entry, arriving)

        return leaves, take

    def take_groups(self) -> None:
        """Give the inner optimizer the values of the outer one's groups."""
        outer, inner = self._optimizer.param_groups, self._inner
        for given, own in zip(outer, inner.param_groups, strict=True):
            own.update({key: value for key, value in given.items() if key != "params"})
        # Optimizers add values here that their older versions did not save.
        inner.__setstate__({"state": inner.state, "param_groups": inner.param_groups})

    @property
    def _inner(self) -> Any:  # noqa: ANN401
        return self._optimizer.optim

    def _owned(self) -> dict[int, Any]:
        """Return the owned parameters by their index in the outer groups."""
        own = {id(p) for group in self._inner.param_groups for p in group["params"]}
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        return {index: param for index, param in enumerate(params) if id(param) in own}

    def _entry(self, index: int, param: Any) -> dict[str, Any]:  # noqa: ANN401
        entry = dict(self._inner.state.get(param, {}))
        for key, value in entry.items():
            if type(key) is not str or "/" in key or not is_leaf_value(value):
                raise StageError(
                    f"the state {key!r} of parameter {index} of a ZeroRedundancyOptimizer "
                    f"is a {type(value).__name__}: only its owner has it, and only tensors "
                    "are saved from a single rank; take the inner optimizer without it"
                )
        return entry


class OptimizerState(NestedState):
    """Hyperparameters and per-parameter state of an optimizer.

    Works for any optimizer with ``state_dict()``: empty state, LBFGS, bfloat16 moments,
    0-dim steps, entries that are not tensors. State that the optimizer has is restored in
    place; state that it lacks is made from the saved one: ``step()`` is never called, so no
    parameter and no gradient changes. Of a ZeroRedundancyOptimizer each rank saves and
    restores the state of the parameters that it owns. In a stage of a pipeline, whose
    parameters are DTensors of the stage's ranks, it is that of the stage's parameters.

    A parameter gets the saved state of the parameter of its name. Names are those of
    ``module``, else those that the optimizer was given (``Adam(model.named_parameters())``,
    torch 2.6 and newer). Without names, only their order identifies parameters: two of one
    shape that change places in the next run get each other's state, without any error.
    `TrainState` knows the names.

    Args:
        name: As for `mpi_ckpt.State`.
        optimizer: An optimizer over the same parameters as when it was saved, group by
            group; in the same order, if they have no names.
        module: The module that owns the parameters.
        sync: As for `LeafState`.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal, or
            it is no optimizer.
    """

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        *,
        module: torch.nn.Module | None = None,
        sync: SyncMode = "root",
    ) -> None:
        super().__init__(name, sync=sync)
        if not is_optimizer(optimizer):
            raise RegistrationError(
                f"state {name!r}: a {type(optimizer).__name__} is not an optimizer: it "
                "lacks state_dict(), load_state_dict() or param_groups; for an object "
                "that has the first two, take a SchedulerState"
            )
        self._optimizer = optimizer
        self._owned = OwnedState(optimizer) if is_dealt_out(optimizer) else None
        if self._owned and getattr(optimizer, "_overlap_with_ddp", False):
            raise RegistrationError(
                f"state {name!r}: a ZeroRedundancyOptimizer with overlap_with_ddp=True has "
                "no optimizer of its own before it has stepped; make it without"
            )
        self._module = module
        self._size = 1
        self._kept: KeptOptimizer | None = None
        self.gate: Gate | None = None
        """Passed by ``step()`` before it changes anything; see `Leaf`."""

    def bind(self, comm: Communicator) -> None:
        """See `LeafState`. Not collective."""
        self._size = comm.size

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        known = None if self._kept is None else self._kept.find(self._optimizer)
        if known is not None:
            return known
        if self._is_stage:
            captured = flatten(named_contents(self.nested())).capture()
            groups, state = self._optimizer.param_groups, self._optimizer.state
            own = named_leaves(groups, self._described()[1], state)
        elif self._owned:
            captured, own = super().capture(), self._owned.leaves()
        else:
            return self._walk()
        return self._gated(captured.structure, [*captured.leaves, *own])

    def _walk(self) -> Capture:
        """Capture an optimizer whose whole state this rank has, and keep the capture."""
        from mpi_ckpt.states.kept_leaves import KeptOptimizer

        found = flatten(self.nested())
        captured = self._gated(found.structure, found.leaves.values())
        args = self._optimizer, self._module, found.values, captured
        self._kept = KeptOptimizer.of(*args)
        return captured

    def _gated(self, structure: Structure, leaves: Iterable[Leaf]) -> Capture:
        # Not the groups: the scheduler may change a rate that is a tensor.
        gated = [
            leaf.behind(self.gate) if leaf.spec.name.startswith(STATE) else leaf
            for leaf in leaves
        ]
        return Capture(structure, gated)

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        whole = with_entries(structure, [spec.name for spec in specs])
        saved = SavedParams(self.name, whole)
        saved.require_class(self._class_name)
        tied = {} if self._module is None else tied_names(self._module)
        order = saved.order_for(self._described(), tied, is_stage=self._is_stage)
        moved, renamed = saved.reordered(order, specs)
        here = [spec for spec in renamed if spec is not None]
        if self._owned:
            arrival = self._prepare_owned(self._owned, moved, here, strict=strict)
        else:
            arrival = super().prepare(moved, here, strict=strict)
        return arrival if len(here) == len(specs) else _spread(arrival, renamed)

    def _prepare_owned(
        self,
        owned: OwnedState,
        structure: Structure,
        specs: Sequence[LeafSpec],
        *,
        strict: bool,
    ) -> Arrival:
        of_params = [spec for spec in specs if spec.name.startswith(STATE)]
        others = [spec for spec in specs if not spec.name.startswith(STATE)]
        leaves, take = owned.targets(structure, of_params, self.device_of)
        content = {**structure["content"], "state": {}}
        groups = super().prepare({**structure, "content": content}, others, strict=strict)
        targets = dict(zip(of_params, leaves, strict=True))
        targets.update(zip(others, groups.leaves, strict=True))
        places = {spec: place for place, spec in enumerate(others)}

        def adopt() -> None:
            take()
            groups.adopt()

        def elsewhere(index: int) -> Leaf | None:
            place = places.get(specs[index])
            return None if place is None else groups.elsewhere(place)

        return Arrival([targets[spec] for spec in specs], adopt, elsewhere=elsewhere)

    def observe_resize(
        self,
        structure: Structure,  # noqa: ARG002
        saved_size: int,  # noqa: ARG002
        size: int,  # noqa: ARG002
    ) -> Callable[[], Change]:
        """See `LeafState`. Not collective."""
        made = self._rates()

        def look() -> Change:
            now = self._rates()
            if now == made:
                return Change()
            text = f"{self.name}: the learning rate is {_listed(now)}"
            return Change(f"{text}, the program had {_listed(made)}", is_unusual=True)

        return look

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        content = self._state_dict()
        # An empty entry of a parameter means the same as none, until its first step.
        content["state"] = {
            key: value
            for key, value in content["state"].items()
            if not (isinstance(value, dict) and not value)
        }
        shapes, names = self._described()
        value = {
            "class": self._class_name,
            "content": content,
            "params": shapes,
            "names": names,
        }
        return {**value, OWNED: 1} if self._owned else value

    def device_of(self, leaf: str) -> Any:  # noqa: ANN401
        """See `NestedState`: the device that torch itself would choose. Not collective."""
        param, group = self._owner_of(leaf)
        if param is None:
            return "cpu"
        is_step = leaf.endswith("/step")
        on_host = is_step and not (group.get("capturable") or group.get("fused"))
        return "cpu" if on_host else param.device

    def like(self, spec: LeafSpec) -> Any:  # noqa: ANN401
        """See `NestedState`: the parameter, if it is a DTensor. Not collective."""
        param, _ = self._owner_of(spec.name)
        if not is_dtensor(param):
            return None
        # Optimizers keep plain tensors for single numbers, such as their steps.
        is_number = not spec.shape and (param.shape or spec.name.endswith("/step"))
        return None if is_number else param

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        content = value["content"]
        # Order and names of the parameters are those of this program.
        for live, saved in zip(
            self._state_dict()["param_groups"],
            content["param_groups"],
            strict=True,
        ):
            saved["params"] = live["params"]
            saved.pop("param_names", None)
            if "param_names" in live:
                saved["param_names"] = live["param_names"]
        if self._owned:
            self._replace_groups(content["param_groups"])
            self._owned.take_groups()
        elif self._has_own_loading():
            self._optimizer.load_state_dict(content)
        else:
            self._replace(content)

    def _replace(self, content: dict[str, Any]) -> None:
        # This does the same as torch's load_state_dict, without its copies and casts: it
        # would cast float32 moments of bfloat16 parameters to bfloat16.
        optimizer, params = self._optimizer, self._params()
        optimizer.state.clear()
        for key, entry in content["state"].items():
            optimizer.state[params[key] if isinstance(key, int) else key] = entry
        self._replace_groups(content["param_groups"])
        # Optimizers add values here that their older versions did not save.
        optimizer.__setstate__(
            {"state": optimizer.state, "param_groups": optimizer.param_groups}
        )

    def _owner_of(self, leaf: str) -> tuple[Any, dict[str, Any]]:
        """Return the parameter whose state a leaf is, and its group; None for another."""
        parts = leaf.split("/")  # content/state/<index>/<key>...
        if parts[:2] == ["content", "state"] and parts[2].isdecimal():
            index = int(parts[2])
            for group in self._optimizer.param_groups:
                if index < len(group["params"]):
                    return group["params"][index], group
                index -= len(group["params"])
        return None, {}

    def _replace_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        for live, saved in zip(self._optimizer.param_groups, groups, strict=True):
            members = live["params"]
            live.clear()
            live.update({**saved, "params": members})

    def _state_dict(self) -> dict[str, Any]:
        return self._owned.groups() if self._owned else dict(self._optimizer.state_dict())

    @property
    def _is_stage(self) -> bool:
        return not self._owned and is_stage(self._params(), self._size)

    @property
    def _class_name(self) -> str:
        return self._owned.class_name if self._owned else type(self._optimizer).__name__

    def _has_own_loading(self) -> bool:
        import torch

        optimizer: Any = self._optimizer
        base: Any = torch.optim.Optimizer
        return (
            type(optimizer).load_state_dict is not base.load_state_dict
            or bool(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None))
            or bool(getattr(optimizer, "_optimizer_load_state_dict_post_hooks", None))
        )

    def _rates(self) -> list[float]:
        rates = [group.get("lr") for group in self._optimizer.param_groups]
        return [float(rate) for rate in rates if rate is not None]

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _described(self) -> tuple[Shapes, Names]:
        known = {} if self._module is None else parameter_names(self._module)
        return describe_params(self._optimizer.param_groups, known)


def _spread(arrival: Arrival, specs: Sequence[LeafSpec | None]) -> Arrival:
    """Return an arrival of some leaves as one of all: None stands for the others."""
    numbers = count()
    places = [None if spec is None else next(numbers) for spec in specs]

    def elsewhere(index: int) -> Leaf | None:
        place = places[index]
        return None if place is None else arrival.elsewhere(place)

    leaves = [None if place is None else arrival.leaves[place] for place in places]
    return replace(arrival, leaves=leaves, elsewhere=elsewhere)


def _listed(rates: list[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates)) or "none"


def is_optimizer(value: object) -> bool:
    """Return whether a value is an optimizer, torch's or one with its interface.

    Not collective.
    """
    import torch

    if isinstance(value, torch.optim.Optimizer):
        return True
    given: Any = value
    return (
        is_stateful(value)
        and isinstance(getattr(value, "param_groups", None), list)
        and {"state", "param_groups"} <= set(given.state_dict())
    )
