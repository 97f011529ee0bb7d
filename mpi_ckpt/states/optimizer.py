# SPDX-License-Identifier: Apache-2.0
"""A torch optimizer as a state, without ever taking a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.state import Capture
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.nested import NestedState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mpi_ckpt.leaf import Gate, LeafSpec
    from mpi_ckpt.state import Structure, SyncMode

__all__ = ["OptimizerState"]

_STATE = "content/state/"


class OptimizerState(NestedState):
    """Hyperparameters and per-parameter state of an optimizer.

    Works for any optimizer with ``state_dict()``: empty state, LBFGS, bfloat16 moments,
    0-dim steps, entries that are no tensors. State the optimizer has is restored in
    place; state it lacks is made from what was saved: ``step()`` is never called, so no
    parameter and no gradient changes.

    Args:
        name: As for `mpi_ckpt.State`.
        optimizer: Over the same parameters, in the same order, as when it was saved.
        sync: As for `LeafState`.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal.
    """

    def __init__(
        self, name: str, optimizer: torch.optim.Optimizer, *, sync: SyncMode = "root"
    ) -> None:
        super().__init__(name, sync=sync)
        self._optimizer = optimizer
        self.gate: Gate | None = None
        """Passed by ``step()`` before it changes anything; see `Leaf`."""

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        captured = super().capture()
        # Not the groups: a rate kept as a tensor is the scheduler's to change.
        leaves = [
            leaf.behind(self.gate) if leaf.spec.name.startswith(_STATE) else leaf
            for leaf in captured.leaves
        ]
        return Capture(captured.structure, leaves)

    def nested(self) -> Any:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        content = dict(self._optimizer.state_dict())
        # A parameter may have an empty entry or none: the same, until it gets a step.
        content["state"] = {key: one for key, one in content["state"].items() if one}
        return {"content": content, "params": self._param_shapes()}

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:  # noqa: ARG002
        """See `NestedState`. Not collective."""
        saved = structure.get("params") if isinstance(structure, dict) else None
        if not isinstance(saved, list):
            raise StateMismatchError(f"state {self.name!r} was not saved from an optimizer")
        live = self._param_shapes()
        problems = []
        if len(saved) != len(live):
            problems.append(
                f"{len(saved)} parameter groups are saved, the program has {len(live)}"
            )
        for group, (theirs, ours) in enumerate(zip(saved, live, strict=False)):
            if len(theirs) != len(ours):
                problems.append(
                    f"group {group} is saved with {len(theirs)} parameters, the program "
                    f"has {len(ours)}"
                )
            problems += [
                f"group {group}, parameter {i} is saved with shape {a}, the program has {b}"
                for i, (a, b) in enumerate(zip(theirs, ours, strict=False))
                if a != b
            ]
        raise_mismatch(self.name, problems)

    def device_of(self, leaf: str) -> Any:  # noqa: ANN401
        """See `NestedState`: where torch itself would put it. Not collective."""
        parts = leaf.split("/")  # content/state/<index>/<key>...
        if parts[:2] != ["content", "state"] or not parts[2].isdecimal():
            return "cpu"
        params = self._params()
        group_of = [g for g in self._optimizer.param_groups for _ in g["params"]]
        index = int(parts[2])
        if index >= len(params):
            return "cpu"
        group = group_of[index]
        on_host = parts[-1] == "step" and not (
            group.get("capturable") or group.get("fused")
        )
        return "cpu" if on_host else params[index].device

    def accept(self, value: Any) -> None:  # noqa: ANN401
        """See `NestedState`. Not collective."""
        content = value["content"]
        if self._has_own_loading():
            self._optimizer.load_state_dict(content)
        else:
            self._replace(content)

    def _replace(self, content: dict[str, Any]) -> None:
        # What torch's load_state_dict does, without its copies and casts: it would
        # cast float32 moments of bfloat16 parameters to bfloat16.
        optimizer, params = self._optimizer, self._params()
        optimizer.state.clear()
        for key, entry in content["state"].items():
            optimizer.state[params[key] if isinstance(key, int) else key] = entry
        for live, saved in zip(
            optimizer.param_groups, content["param_groups"], strict=True
        ):
            members = live["params"]
            live.clear()
            live.update({**saved, "params": members})
        # Optimizers fill in here what older versions of themselves did not save.
        optimizer.__setstate__(
            {"state": optimizer.state, "param_groups": optimizer.param_groups}
        )

    def _has_own_loading(self) -> bool:
        import torch

        optimizer: Any = self._optimizer
        base: Any = torch.optim.Optimizer
        return (
            type(optimizer).load_state_dict is not base.load_state_dict
            or bool(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None))
            or bool(getattr(optimizer, "_optimizer_load_state_dict_post_hooks", None))
        )

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _param_shapes(self) -> list[list[list[int]]]:
        return [
            [list(p.shape) for p in group["params"]]
            for group in self._optimizer.param_groups
        ]
