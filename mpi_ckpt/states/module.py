# SPDX-License-Identifier: Apache-2.0
"""Saves a torch module: parameters and buffers, in place, tied ones once."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.state import Arrival, Capture, LeafState, Structure, SyncMode
from mpi_ckpt.states.buffers.array_bytes import ReadonlyMemory
from mpi_ckpt.states.leaf_values import KIND, make_value
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.module_contents import (
    EXTRA,
    ModuleContents,
    loads_itself,
    owners,
    try_loading,
)
from mpi_ckpt.states.stages import is_stage
from mpi_ckpt.states.tree import check_structure, leaf_nodes, unflatten
from mpi_ckpt.states.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

    from mpi_ckpt.comm import Communicator
    from mpi_ckpt.leaves.leaf import Gate, Leaf, LeafSpec
    from mpi_ckpt.states.kept_leaves import KeptModule

__all__ = ["ModuleState"]


class ModuleState(LeafState):
    """The parameters, persistent buffers and extra state of a module.

    Restored in place, so optimizers, data-parallel wrappers and CUDA graphs keep their
    references. Tied parameters are saved once and stay tied. Names are those of the modules
    inside DistributedDataParallel, DataParallel and torch.compile, at any depth: a state
    saved with such a wrapper fits a program without it, and vice versa.

    If a module changes how it is loaded, by a hook or an override, it is loaded that way,
    as by ``load_state_dict``: it may make, resize and derive tensors.

    Args:
        name: As for `mpi_ckpt.State`.
        module: Any module, on any device, with or without frozen and unused parameters.
        sync: As for `LeafState`.

    Raises:
        RegistrationError: On every rank that makes it, if the name or mode is illegal, or
            it is no module, or a sharded one (FullyShardedDataParallel).
    """

    def __init__(
        self, name: str, module: torch.nn.Module, *, sync: SyncMode = "root"
    ) -> None:
        super().__init__(name, sync=sync)
        self._module = unwrapped(name, module)
        self._is_looked_at = False
        self._kept: KeptModule | None = None
        self._size = 1
        self.gate: Gate | None = None
        """Passed by whoever changes the parameters; see `Leaf`."""

    def bind(self, comm: Communicator) -> None:
        """See `LeafState`. Not collective."""
        self._size = comm.size

    def capture(self) -> Capture:
        """See `LeafState`. Not collective."""
        known = None if self._kept is None else self._kept.find()
        if known is not None:
            return known
        # Checked at the first save; tensors replaced later are checked at the restore.
        memory = None if self._is_looked_at else ReadonlyMemory()
        contents = ModuleContents(self._module, memory)
        contents.require_savable()
        self._is_looked_at = True
        versions = {
            path: of_module["version"]
            for path, of_module in contents.versions.items()
            if of_module.get("version", 1) != 1
        }
        structure = {"ties": contents.ties, "extra": contents.extra.structure}
        if versions:
            structure["versions"] = versions
        leaves = [
            leaf.behind(self.gate) if name in contents.parameters else leaf
            for name, leaf in contents.leaves.items()
        ]
        captured = Capture(structure, [*leaves, *contents.extra.leaves.values()])
        self._keep(contents, captured)
        return captured

    def _keep(self, contents: ModuleContents, captured: Capture) -> None:
        from mpi_ckpt.states.kept_leaves import KeptModule

        self._kept = None
        if not (contents.computed or contents.extra_names):
            self._kept = KeptModule.of(self._module, contents.values, captured)

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        """See `LeafState`. Not collective."""
        saved = _Saved(self.name, structure, specs)
        live = ModuleContents(self._module, ReadonlyMemory())
        live.tie_to({spec.name for spec in saved.tensors})
        is_part = is_stage(self._module.parameters(), self._size)
        unfit, absent = _unfit(saved, live), _absent(saved, live, is_part=is_part)
        own = self._loaded_by_themselves(saved, live, {**unfit, **absent}, strict=strict)
        problems = [text for name, text in unfit.items() if name not in own]
        absent = {name: text for name, text in absent.items() if name not in own}
        raise_mismatch(self.name, [*problems, *absent.values()] if strict else problems)
        made: dict[str, Any] = {}
        targets: list[Leaf | None] = []
        for spec in specs:
            leaf = live.leaves.get(spec.name)
            if spec.name in saved.extra or spec.name in own:
                node = saved.extra.get(spec.name, {KIND: "tensor"})
                made[spec.name], leaf = make_value(spec, node)
            targets.append(leaf)
        return Arrival(
            targets,
            lambda: self._adopt(saved, live, made, strict=strict),
            missing=tuple(name for name in absent if name in live.leaves),
            unexpected=tuple(name for name in absent if name not in live.leaves),
        )

    def _loaded_by_themselves(
        self,
        saved: _Saved,
        live: ModuleContents,
        unfit: Collection[str],
        *,
        strict: bool,
    ) -> set[str]:
        """Return the misfits, and the leaves that the module accepts in spite of it.

        The check uses a copy of the part that loads itself, since nothing may be
        overwritten if the module refuses.
        """
        parts: dict[str, torch.nn.Module] = {}
        homes: dict[str, str] = {}
        for name in unfit:
            for path, part in owners(self._module, live.outer.get(name, name)):
                if loads_itself(part):
                    parts[path], homes[name] = part, path
                    break
        accepted: set[str] = set()
        for path, part in parts.items():
            prefix = f"{path}." if path else ""
            values = {
                live.outer.get(name, name).removeprefix(prefix): value
                for name, value in self._forms(saved, live).items()
                if live.outer.get(name, name).startswith(prefix)
            }
            if try_loading(part, values, strict=strict) is None:
                accepted |= {name for name, home in homes.items() if home == path}
        return accepted

    def _forms(self, saved: _Saved, live: ModuleContents) -> dict[str, Any]:
        """Return for each saved tensor a value of its form."""
        forms: dict[str, Any] = {}
        for spec in saved.tensors:
            leaf = live.leaves.get(spec.name)
            if leaf is not None and leaf.spec == spec:
                forms[spec.name] = live.values[spec.name]
            else:
                forms[spec.name] = make_value(spec, {KIND: "tensor"})[0].zero_()
        for name, source in saved.ties.items():
            forms[name] = forms[source]
        return forms

    def _adopt(
        self, saved: _Saved, live: ModuleContents, made: dict[str, Any], *, strict: bool
    ) -> None:
        # Tied when saved, separate in this program: each gets the value.
        for name, source in saved.ties.items():
            if name in live.leaves and source in live.leaves:
                _copy_leaf(live.leaves[source], live.leaves[name])
        extra = {
            name: value
            for name, value in unflatten(saved.structure["extra"], made).items()
            if strict or name in live.extra_names
        }
        loads = live.computed or any(map(loads_itself, self._module.modules()))
        if loads or any(name.rpartition(".")[2] != EXTRA for name in extra):
            own = {name: value for name, value in made.items() if name not in saved.extra}
            self._load(saved, live, own, extra)
            return
        for name, value in extra.items():
            path = live.outer.get(name, name).rpartition(EXTRA)[0].rstrip(".")
            self._module.get_submodule(path).set_extra_state(value)

    def _load(
        self,
        saved: _Saved,
        live: ModuleContents,
        made: Mapping[str, Any],
        extra: Mapping[str, Any],
    ) -> None:
        # Reading the module again would compute the old values, so load it with the filled
        # values, and with all others, since its hooks may need several at once.
        values = {name: v for name, v in live.values.items() if name not in live.lazy}
        values |= made
        values |= {
            k: values[source] for k, source in saved.ties.items() if source in values
        }
        values |= extra
        given = OrderedDict((live.outer.get(k, k), v) for k, v in values.items())
        given._metadata = _versions(saved, live)  # type: ignore[attr-defined] # noqa: SLF001
        outcome = self._module.load_state_dict(given, strict=False)
        refused = set(getattr(outcome, "unexpected_keys", ())) & {
            live.outer.get(name, name) for name in live.computed
        }
        if refused:
            raise StateMismatchError(
                f"state {self.name!r}: the module does not take back "
                f"{sorted(refused)}, which are in its own state dict"
            )


class _Saved:
    """The saved contents of a module.

    Attributes:
        structure: Its JSON values.
        ties: As in `ModuleContents`.
        extra: Node of each leaf of the entries that are not tensors.
        entries: Names of those entries.
        tensors: Specs of all other leaves.
        versions: Path of a module -> its version, if that is not the first.
    """

    def __init__(self, state: str, structure: Structure, specs: Sequence[LeafSpec]) -> None:
        try:
            self.structure = structure
            self.ties: dict[str, str] = dict(structure["ties"])
            self.extra = leaf_nodes(structure["extra"])
            self.entries = set(structure["extra"])
            self.versions: dict[str, int] = dict(structure.get("versions", {}))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise StateMismatchError(
                f"state {state!r} was not saved from a module"
            ) from error
        self.tensors = [spec for spec in specs if spec.name not in self.extra]
        check_structure(structure["extra"], specs)
        names = {spec.name for spec in self.tensors}
        if not names.issuperset(self.ties.values()):
            raise StateMismatchError(f"state {state!r} was not saved from a module")


def _versions(saved: _Saved, live: ModuleContents) -> dict[str, dict[str, Any]]:
    """Return the version under which each module was saved, in torch's form."""
    versions = {
        path: {**of_module, "version": saved.versions.get(path, 1)}
        for path, of_module in live.versions.items()
    }
    outer = {}
    for name, full in live.outer.items():
        path, outside = name.rpartition(".")[0], full.rpartition(".")[0]
        if path in versions:
            outer[outside] = versions[path]
    return {**versions, **outer}


def _unfit(saved: _Saved, live: ModuleContents) -> dict[str, str]:
    """Return the common leaves that do not fit: names, and the problem of each."""
    specs = {spec.name: spec for spec in saved.tensors}
    there = {name: leaf.spec for name, leaf in live.leaves.items()}
    problems = {
        name: f"{name} {why}, in the program: bytes cannot be put into it"
        for name, why in live.fixed.items()
        if name in specs and name not in live.computed
    }
    for name, spec in specs.items():
        if name in live.ties:
            problems[name] = (
                f"{name} is tied to {live.ties[name]} in the program, apart in the "
                "checkpoint"
            )
        elif name in there and there[name] != spec:
            problems[name] = f"{spec} is saved, the program has {there[name]}"
        elif name in live.lazy:
            problems[name] = f"{spec} is saved, the program has no shape for it yet"
    for name, source in saved.ties.items():
        if name in there and not _alike(there[name], specs[source]):
            problems[name] = f"{name}: saved as {specs[source]}, program has {there[name]}"
        if name in there and source in there and not _cut_alike(live, name, source):
            problems[name] = (
                f"{name} is tied to {source} in the checkpoint, and cut over the ranks in "
                "another way than it in the program"
            )
        if name in there and source not in there:
            problems[name] = (
                f"{name} is tied to {source} in the checkpoint, which the program lacks"
            )
        tied = live.ties.get(name, source)
        if saved.ties.get(tied, tied) != source:
            problems[name] = (
                f"{name} is tied to {live.ties[name]} in the program, to {source} in the "
                "checkpoint"
            )
    return problems


def _absent(saved: _Saved, live: ModuleContents, *, is_part: bool) -> dict[str, str]:
    """Return the leaves that only one side has: names, and the problem of each.

    If the module is part of a larger one, or a leaf was saved cut, other ranks may have it:
    that no rank does is found when the ranks meet.
    """
    specs = {spec.name: spec for spec in saved.tensors}
    known = {*live.leaves, *live.ties, *live.lazy}
    known |= {spec.name for spec in saved.tensors if is_part or spec.is_cut}
    known |= {name for name, of in saved.ties.items() if is_part or specs[of].is_cut}
    absent: dict[str, str] = {
        name: f"{specs.get(name, name)} is saved, the program has no such parameter"
        for name in (*specs, *saved.ties)
        if name not in known
    }
    absent |= {
        name: f"{name} is saved, the program has no such entry"
        for name in saved.entries - set(live.extra_names)
    }
    absent |= {
        name: f"{leaf.spec} is in the program, not in the checkpoint"
        for name, leaf in live.leaves.items()
        if name not in specs and name not in saved.ties
    }
    return absent | {
        name: f"{name} is in the program, not in the checkpoint"
        for name in (*live.extra_names, *live.lazy)
        if name not in saved.entries and name not in specs
    }


def _cut_alike(live: ModuleContents, name: str, source: str) -> bool:
    ours, theirs = live.leaves[name].tiles, live.leaves[source].tiles
    if ours is None or theirs is None:
        return ours is theirs
    return [tile.box for tile in ours] == [tile.box for tile in theirs]


def _copy_leaf(source: Leaf, target: Leaf) -> None:
    """Copy the bytes of a leaf into another, which is cut in the same way."""
    if source.tiles is None or target.tiles is None:
        target.buffer.write(source.buffer.read())
        return
    for ours, theirs in zip(source.tiles, target.tiles, strict=True):
        theirs.buffer.write(ours.buffer.read())


def _alike(first: LeafSpec, second: LeafSpec) -> bool:
    return (first.dtype, first.shape) == (second.dtype, second.shape)
