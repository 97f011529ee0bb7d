# SPDX-License-Identifier: Apache-2.0
"""All of a training in one state."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

from mpi_ckpt.errors import RegistrationError, StateMismatchError
from mpi_ckpt.leaf import Gate, Leaf
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure, SyncMode
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.module import ModuleState
from mpi_ckpt.states.optimizer import OptimizerState
from mpi_ckpt.states.scheduler import SchedulerState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mpi_ckpt.leaf import LeafSpec
    from mpi_ckpt.states.scheduler import Stateful

__all__ = ["TrainState"]


class TrainState(LeafState):
    """Module, optimizer, scheduler and gradient scaler as one state.

    Args:
        module: The model.
        optimizer: Its optimizer.
        scheduler: Anything with a state dict of plain values.
        scaler: Likewise, a ``torch.amp.GradScaler`` as a rule.
        name: As for `mpi_ckpt.State`.
        sync: As for `LeafState`.
        overlap: Whether an asynchronous save returns before parameters and optimizer
            state are copied. The copy then goes on behind forward and backward, and
            ``step()`` of any torch optimizer waits for it. Whoever changes them
            otherwise in that time spoils the save: torch notices that, and the save
            fails, unless it is done through ``.data`` or NumPy. All else is copied at
            once, buffers of the module too.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal,
            or if there is nothing to wait in.
    """

    def __init__(
        self,
        *,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        name: str = "train",
        sync: SyncMode = "root",
        overlap: bool = False,
    ) -> None:
        super().__init__(name, sync=sync)
        self._gate = Gate()
        if overlap and optimizer is None:
            raise RegistrationError(
                f"state {name!r}: overlap=True needs the optimizer, whose step() waits for "
                "the copy"
            )
        # The optimizer comes after the module it optimizes, the scheduler after the
        # optimizer whose rates it sets.
        self._parts: dict[str, LeafState] = {"module": ModuleState("module", module)}
        if optimizer is not None:
            self._parts["optimizer"] = OptimizerState("optimizer", optimizer)
        if scheduler is not None:
            self._parts["scheduler"] = SchedulerState("scheduler", scheduler)
        if scaler is not None:
            self._parts["scaler"] = SchedulerState("scaler", scaler)
        if overlap:
            self._let_steps_wait()

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        captured = {key: part.capture() for key, part in self._parts.items()}
        leaves = [
            leaf.under(f"{key}/") for key, one in captured.items() for leaf in one.leaves
        ]
        return Capture({key: one.structure for key, one in captured.items()}, leaves)

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        """See `LeafState`; parts may be left out like leaves. Not collective."""
        self._gate.wait()
        self._check_parts(structure, strict=strict)
        arrivals: list[Arrival] = []
        targets: dict[str, Leaf | None] = {}
        missing = [f"{key}/*" for key in self._parts if key not in structure]
        unexpected = [f"{key}/*" for key in structure if key not in self._parts]
        problems: list[str] = []
        for key, part in self._parts.items():
            if key not in structure:
                continue
            prefix = f"{key}/"
            ours = [
                replace(spec, name=spec.name.removeprefix(prefix))
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
            missing += [prefix + name for name in arrival.missing]
            unexpected += [prefix + name for name in arrival.unexpected]
        raise_mismatch(self.name, problems)

        def adopt() -> None:
            for arrival in arrivals:
                arrival.adopt()

        found = [targets.get(spec.name) for spec in specs]
        leaves = [
            one and Leaf(spec, one.buffer) for spec, one in zip(specs, found, strict=True)
        ]
        return Arrival(leaves, adopt, tuple(missing), tuple(unexpected))

    def _let_steps_wait(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        gate = self._gate
        for part in self._parts.values():
            if isinstance(part, ModuleState | OptimizerState):
                part.gate = gate
        # Of every optimizer: another may hold some of the parameters too.
        hook = register_optimizer_step_pre_hook(lambda *_: gate.wait())
        weakref.finalize(self, hook.remove)

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
