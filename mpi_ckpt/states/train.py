# SPDX-License-Identifier: Apache-2.0
"""Combines module, optimizer, scheduler and scaler in one state."""

from __future__ import annotations

import weakref
from functools import partial
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

from mpi_ckpt import devices
from mpi_ckpt.errors import RegistrationError, StateMismatchError
from mpi_ckpt.leaves.buckets import Leaves
from mpi_ckpt.leaves.leaf import Gate, Leaf, LeafSpec
from mpi_ckpt.state import Arrival, Capture, Change, LeafState, Structure, SyncMode
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.module import ModuleState
from mpi_ckpt.states.nested import SchedulerState, is_off
from mpi_ckpt.states.optimizer import OptimizerState, is_optimizer
from mpi_ckpt.states.wrappers import is_of_class

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.states.nested import Stateful

__all__ = ["TrainState"]

_NO_LEAVES: tuple[Leaf, ...] = ()


class TrainState(LeafState):
    """Module, optimizer, scheduler and gradient scaler as one state.

    Args:
        module: The model.
        optimizer: Its optimizer, or several in a list. The state of a parameter goes to the
            parameter of the same name.
        scheduler: Anything with a state dict of plain values, or several in a list.
        scaler: The same for gradient scalers, usually a ``torch.amp.GradScaler``. One that
            is switched off counts as absent.
        name: As for `mpi_ckpt.State`.
        sync: As for `LeafState`.
        overlap: Whether an asynchronous save returns before parameters and optimizer state
            are copied. The copy then continues during forward and backward, and ``step()``
            of any torch optimizer waits for it. Any other change in that time spoils the
            save: torch notices it, and the save fails, unless the change was made through
            ``.data`` or NumPy. All else is copied at once, buffers of the module too. A
            replay of a captured CUDA graph passes no ``step()``: where one may have it, an
            asynchronous save of tensors on a device is refused with a `StageError`.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal, a
            part is of the wrong kind, or ``overlap`` has no optimizer that could wait.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        scheduler: Stateful | Sequence[Stateful] | None = None,
        scaler: Stateful | None = None,
        *,
        name: str = "train",
        sync: SyncMode = "root",
        overlap: bool = False,
    ) -> None:
        super().__init__(name, sync=sync)
        self._gate = Gate()
        # The optimizer comes after the module it optimizes, the scheduler after the
        # optimizer whose rates it sets.
        self._all: dict[str, LeafState] = {"module": ModuleState("module", module)}
        for key, item in _numbered("optimizer", optimizer):
            self._all[key] = _optimizer_state(key, item, module, overlap=overlap)
        for key, item in _numbered("scheduler", scheduler):
            _refuse_another_kind(key, item, "torch.optim", "Optimizer", "optimizer")
            self._all[key] = SchedulerState(key, item)
        if scaler is not None:
            self._all["scaler"] = SchedulerState("scaler", scaler)
        self._scaler = scaler
        self._renamed = {key: _RenamedLeaves(f"{key}/") for key in self._all}
        self._specs: list[Sequence[LeafSpec]] = []
        self._all_specs: tuple[LeafSpec, ...] = ()
        self._parts_joined: list[Sequence[Leaf]] = []
        self._joined: Leaves[Leaf] = Leaves()
        if overlap and optimizer is None:
            raise RegistrationError(
                f"state {name!r}: overlap=True needs the optimizer, whose step() waits for "
                "the copy"
            )
        if overlap:
            self._let_steps_wait([item for _, item in _numbered("optimizer", optimizer)])

    @property
    def _parts(self) -> dict[str, LeafState]:
        if not is_off(self._scaler):
            return self._all
        return {key: part for key, part in self._all.items() if key != "scaler"}

    def bind(self, comm: Communicator) -> None:
        """See `LeafState`. Not collective."""
        for part in self._all.values():
            part.bind(comm)

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        captured = {key: part.capture() for key, part in self._parts.items()}
        structure = {key: content.structure for key, content in captured.items()}
        if any(content.cut for content in captured.values()):
            leaves = [
                leaf.under(f"{key}/")
                for key, content in captured.items()
                for leaf in content.leaves
            ]
            return Capture(structure, leaves)
        parts = [self._renamed[key].of(content) for key, content in captured.items()]
        specs = [self._renamed[key].specs for key in captured]
        if not _are_same(specs, self._specs):
            self._specs, self._all_specs = specs, tuple(chain.from_iterable(specs))
        is_lasting = all(one.is_lasting or not one.leaves for one in captured.values())
        joined = self._joined
        if not (is_lasting and _are_same(parts, self._parts_joined)):
            joined = Leaves(chain.from_iterable(parts))
            # Others would keep memory that the program may have dropped.
            self._parts_joined = parts if is_lasting else []
            self._joined = joined if is_lasting else Leaves()
        return Capture.known(structure, joined, self._all_specs, is_lasting=is_lasting)

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        """See `LeafState`; parts may be left out like leaves. Not collective."""
        self._gate.wait()
        self._check_parts(structure, strict=strict)
        arrivals: list[Arrival] = []
        targets: dict[str, Leaf | None] = {}
        homes: dict[str, tuple[Arrival, int]] = {}
        missing = [f"{key}/*" for key in self._parts if key not in structure]
        unexpected = [f"{key}/*" for key in structure if key not in self._parts]
        problems: list[str] = []
        for key, part in self._parts.items():
            if key not in structure:
                continue
            prefix = f"{key}/"
            ours = [
                # Not dataclasses.replace, which takes ten times as long.
                LeafSpec(
                    spec.name.removeprefix(prefix), spec.dtype, spec.shape, spec.is_cut
                )
                for spec in specs
                if spec.name.startswith(prefix)
            ]
            try:
                arrival = part.prepare(structure[key], ours, strict=strict)
            except StateMismatchError as error:
                problems += error.problems or [str(error)]
                continue
            arrivals.append(arrival)
            names = [prefix + spec.name for spec in ours]
            targets.update(zip(names, arrival.leaves, strict=True))
            homes.update((name, (arrival, at)) for at, name in enumerate(names))
            missing += [prefix + name for name in arrival.missing]
            unexpected += [prefix + name for name in arrival.unexpected]
        raise_mismatch(self.name, problems)

        def adopt() -> None:
            for arrival in arrivals:
                arrival.adopt()

        found = [targets.get(spec.name) for spec in specs]
        leaves = [
            leaf and Leaf(spec, leaf.buffer, tiles=leaf.tiles)
            for spec, leaf in zip(specs, found, strict=True)
        ]

        def elsewhere(index: int) -> Leaf | None:
            spec = specs[index]
            arrival, at = homes[spec.name]
            leaf = arrival.elsewhere(at)
            return leaf and Leaf(spec, leaf.buffer, tiles=leaf.tiles)

        return Arrival(leaves, adopt, tuple(missing), tuple(unexpected), elsewhere)

    def observe_resize(
        self, structure: Structure, saved_size: int, size: int
    ) -> Callable[[], Change]:
        """See `LeafState`. Not collective."""
        parts = [(key, part) for key, part in self._parts.items() if key in structure]
        watches = [
            part.observe_resize(structure[key], saved_size, size) for key, part in parts
        ]

        def look() -> Change:
            changes = [change for watch in watches if (change := watch()).text]
            text = "; ".join(f"{self.name}/{change.text}" for change in changes)
            return Change(text, any(change.is_unusual for change in changes))

        return look

    def _let_steps_wait(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        gate = self._gate
        for part in self._parts.values():
            if isinstance(part, ModuleState | OptimizerState):
                part.gate = gate
        captures: list[bool] = []

        def pass_gate(*_: object) -> None:
            if devices.is_capturing():
                captures.append(True)
            gate.wait()

        # A hook of every optimizer: another one may hold some of the parameters too.
        hook = register_optimizer_step_pre_hook(pass_gate)
        weakref.finalize(self, hook.remove)
        # Not of this object, which the hook would keep.
        gate.bypass = partial(_bypass, optimizers, captures)

    def _check_parts(self, structure: Structure, *, strict: bool) -> None:
        saved = set(structure) if isinstance(structure, dict) else set()
        if not strict and saved & set(self._parts):
            return
        problems = [
            f"{key} is saved, the program has none" for key in saved - set(self._parts)
        ]
        problems += [
            f"{key} is in the program, not saved" for key in set(self._parts) - saved
        ]
        raise_mismatch(self.name, sorted(problems))


class _RenamedLeaves:
    """The leaves of a part under longer names, which are kept while the part keeps its own.

    Not collective.

    Attributes:
        specs: The specs of the leaves with the longer names.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._short: tuple[LeafSpec, ...] = ()
        self._given: Sequence[Leaf] | None = None
        self._leaves: Sequence[Leaf] = _NO_LEAVES
        self.specs: Sequence[LeafSpec] = ()

    def of(self, captured: Capture) -> Sequence[Leaf]:
        """Return the leaves of a capture, all of them whole; the same object if kept."""
        if not captured.leaves:
            self._short = self.specs = ()
            return _NO_LEAVES
        if captured.leaves is self._given:
            return self._leaves
        if captured.whole_specs is not self._short:
            self._short = captured.whole_specs
            self.specs = [
                LeafSpec(self._prefix + one.name, one.dtype, one.shape)
                for one in self._short
            ]
        pairs = zip(self.specs, captured.leaves, strict=True)
        leaves = [Leaf(spec, leaf.buffer, leaf.gate) for spec, leaf in pairs]
        lasts = captured.is_lasting
        self._given, self._leaves = (captured.leaves, leaves) if lasts else (None, ())
        return leaves


def _are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _bypass(
    optimizers: Sequence[torch.optim.Optimizer], captures: Sequence[bool]
) -> str | None:
    """Return what may change a device's tensors without a call of ``step()``."""
    if captures:
        return "step() of an optimizer was captured in a graph"
    if any(group.get("capturable") for one in optimizers for group in one.param_groups):
        return "an optimizer is capturable, so that a graph may have its step()"
    if devices.keeps_graphs():
        return "the process keeps captured graphs"
    return None


def _numbered(key: str, given: Any) -> list[tuple[str, Any]]:  # noqa: ANN401
    """Return a given object with the key of its part; several objects are numbered."""
    if given is None:
        return []
    if isinstance(given, (list, tuple)):
        return [(f"{key}{number}", item) for number, item in enumerate(given)]
    return [(key, given)]


def _refuse_another_kind(key: str, given: object, home: str, kind: str, right: str) -> None:
    if isinstance(given, type):
        raise RegistrationError(
            f"{key} is the class {given.__name__}: give an object of it"
        )
    if is_of_class(given, home, kind):
        raise RegistrationError(
            f"{key} is of type {type(given).__name__}: give it as {right}="
        )


def _optimizer_state(
    key: str, optimizer: object, module: torch.nn.Module, *, overlap: bool
) -> LeafState:
    given: Any = optimizer
    _refuse_another_kind(key, given, "torch.optim.lr_scheduler", "LRScheduler", "scheduler")
    if is_optimizer(optimizer):
        return OptimizerState(key, given, module=module)
    if overlap:
        raise RegistrationError(
            "overlap=True needs an optimizer of torch's, whose step() waits for the copy: "
            f"a {type(optimizer).__name__} is not one of torch's"
        )
    # An object that keeps its state in its own form is saved as a whole.
    return SchedulerState(key, given)
