# SPDX-License-Identifier: Apache-2.0
"""A torch module as a state: parameters and buffers, in place, tied ones once."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure, SyncMode
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.tree import flatten, leaf_kinds, make_leaf_value, unflatten
from mpi_ckpt.states.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mpi_ckpt.leaf import Gate, Leaf, LeafSpec

__all__ = ["ModuleState"]

_EXTRA = "_extra_state"


class ModuleState(LeafState):
    """The parameters, persistent buffers and extra state of a module.

    Restored in place, so optimizers, data-parallel wrappers and CUDA graphs keep their
    references. Tied parameters are saved once and stay tied. Names are those of the module
    inside of DistributedDataParallel, DataParallel and torch.compile: what is saved with
    such a wrapper fits a program without it, and the other way round.

    Args:
        name: As for `mpi_ckpt.State`.
        module: Any module, on any device, with frozen and unused parameters or none.
        sync: As for `LeafState`.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal, or
            the module is sharded (FullyShardedDataParallel).
    """

    def __init__(
        self, name: str, module: torch.nn.Module, *, sync: SyncMode = "root"
    ) -> None:
        super().__init__(name, sync=sync)
        self._module = unwrapped(name, module)
        self.gate: Gate | None = None
        """Passed by whoever changes the parameters; see `Leaf`."""

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        contents = _Contents(self._module)
        structure = {"ties": contents.ties, "extra": contents.extra.structure}
        leaves = [
            leaf.behind(self.gate) if name in contents.parameters else leaf
            for name, leaf in contents.leaves.items()
        ]
        return Capture(structure, [*leaves, *contents.extra.leaves.values()])

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        live = _Contents(self._module)
        try:
            saved_ties = dict(structure["ties"])
            extra_kinds = leaf_kinds(structure["extra"])
        except (TypeError, KeyError, ValueError) as error:
            raise StateMismatchError(
                f"state {self.name!r} was not saved from a module"
            ) from error
        saved = [spec for spec in specs if spec.name not in extra_kinds]
        problems = _problems(saved, saved_ties, live)
        absent = _absent(saved, saved_ties, live)
        raise_mismatch(self.name, [*problems, *absent.values()] if strict else problems)
        extra: dict[str, Any] = {}
        targets: list[Leaf | None] = []
        for spec in specs:
            if spec.name in extra_kinds:
                value, leaf = make_leaf_value(spec, extra_kinds[spec.name])
                extra[spec.name] = value
                targets.append(leaf)
            else:
                targets.append(live.leaves.get(spec.name))
        missing = tuple(name for name in absent if name in live.leaves)
        unexpected = tuple(name for name in absent if name not in live.leaves)

        def adopt() -> None:
            # Tied when it was saved, apart in this program: each gets the value.
            for name, source in saved_ties.items():
                if name in live.leaves:
                    live.leaves[name].buffer.write(live.leaves[source].buffer.read())
            if live.computed:
                self._give_back(live)
            for name, value in unflatten(structure["extra"], extra).items():
                if strict or name in live.extra_names:
                    path = name.rpartition(_EXTRA)[0].rstrip(".")
                    self._module.get_submodule(path).set_extra_state(value)

        return Arrival(targets, adopt, missing, unexpected)

    def _give_back(self, targets: _Contents) -> None:
        # A second look at the module would compute the old values anew, so it is given
        # that were filled, and all others, as its hooks may want several at once.
        values = OrderedDict(targets.values)
        values._metadata = targets.versions  # type: ignore[attr-defined] # noqa: SLF001
        outcome = self._module.load_state_dict(values, strict=False)
        refused = set(getattr(outcome, "unexpected_keys", ())) & set(targets.computed)
        if refused:
            raise StateMismatchError(
                f"state {self.name!r}: the module does not take back "
                f"{sorted(refused)}, which are in its own state dict"
            )


class _Contents:
    """A module's state dict, sorted by what can be done with its entries."""

    def __init__(self, module: torch.nn.Module) -> None:
        from mpi_ckpt.states.tensors import tensor_leaf

        parameters = {id(parameter) for parameter in module.parameters()}
        live = parameters | {id(buffer) for buffer in module.buffers()}
        self.parameters: set[str] = set()
        self.leaves: dict[str, Leaf] = {}
        self.ties: dict[str, str] = {}
        self.values: dict[str, torch.Tensor] = {}
        # Made by a hook of the module when asked, so writing into them is not enough.
        self.computed: list[str] = []
        extra: dict[str, Any] = {}
        first: dict[tuple[Any, ...], str] = {}
        state_dict = module.state_dict(keep_vars=True)
        # By which modules tell their own older formats.
        self.versions = getattr(state_dict, "_metadata", {})
        for name, value in state_dict.items():
            if name.rpartition(".")[2] == _EXTRA:
                extra[name] = value
                continue
            self.values[name] = value
            source = first.setdefault(_identity(value), name)
            if source != name:
                self.ties[name] = source
                continue
            self.leaves[name] = tensor_leaf(name, value)
            if id(value) in parameters:
                self.parameters.add(name)
            if id(value) not in live:
                self.computed.append(name)
        self.extra_names = tuple(extra)
        self.extra = flatten(extra, "#extra")


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what is equal for two tensors over the very same memory."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
    )


def _problems(
    saved: Sequence[LeafSpec], saved_ties: dict[str, str], live: _Contents
) -> list[str]:
    """Return how leaves that both sides have do not fit."""
    specs = {spec.name: spec for spec in saved}
    there = {name: leaf.spec for name, leaf in live.leaves.items()}
    problems = []
    for name, spec in specs.items():
        if name in live.ties:
            problems.append(
                f"{name} is tied to {live.ties[name]} in the program, apart in the "
                "checkpoint"
            )
        elif name in there and there[name] != spec:
            problems.append(f"{spec} is saved, the program has {there[name]}")
    for name, source in saved_ties.items():
        if name in there and source in specs and not _alike(there[name], specs[source]):
            problems.append(f"{name}: saved as {specs[source]}, program has {there[name]}")
        if name in there and source not in there:
            problems.append(
                f"{name} is tied to {source} in the checkpoint, which the program lacks"
            )
        if live.ties.get(name, source) != source:
            problems.append(
                f"{name} is tied to {live.ties[name]} in the program, to {source} in the "
                "checkpoint"
            )
    return problems


def _absent(
    saved: Sequence[LeafSpec], saved_ties: dict[str, str], live: _Contents
) -> dict[str, str]:
    """Return what only one side has: names, and what is to be said of each."""
    specs = {spec.name: spec for spec in saved}
    known = {*live.leaves, *live.ties}
    absent = {
        name: f"{specs.get(name, name)} is saved, the program has no such parameter"
        for name in (*specs, *saved_ties)
        if name not in known
    }
    return absent | {
        name: f"{leaf.spec} is in the program, not in the checkpoint"
        for name, leaf in live.leaves.items()
        if name not in specs and name not in saved_ties
    }


def _alike(one: LeafSpec, other: LeafSpec) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)
