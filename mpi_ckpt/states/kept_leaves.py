# SPDX-License-Identifier: Apache-2.0
"""Keeps the captures of modules and optimizers from save to save, while nothing changes.

A walk through a state dict takes some ten microseconds of Python for each tensor, and
nearly always finds what the last one found. Here C code (``map``, ``chain``, comparisons of
lists) compares all that a walk depends on. Any difference means a new walk, and so does all
that could change unseen. Imported only when a torch state is used.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from itertools import chain, compress, repeat
from operator import attrgetter, is_, itemgetter, methodcaller, not_
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from mpi_ckpt.errors import StageError
from mpi_ckpt.leaves.buckets import ManyLeaves
from mpi_ckpt.leaves.leaf import Leaf
from mpi_ckpt.state import Capture
from mpi_ckpt.states.buffers.device_bytes import buffer_of
from mpi_ckpt.states.buffers.tensor_bytes import TensorBuffer, is_ordinary
from mpi_ckpt.states.leaf_values import KIND
from mpi_ckpt.states.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.state import Structure

__all__ = ["KeptModule", "KeptOptimizer"]

# A kept leaf keeps its memory, which the program may have dropped. So large ones are made
# anew each time, which costs little beside the copy of their bytes.
_KEPT_BYTES_MAX = 1 << 20
_ALL_KEPT_BYTES_MAX = 256 << 20

_PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter}
_PLAIN_VALUES = {type(None), bool, int, float, str}
_ADDRESS, _SHAPE = torch.Tensor.data_ptr, attrgetter("shape")
_TENSOR_FACTS: tuple[Callable[[Any], Any], ...] = (
    type,
    *map(attrgetter, ("dtype", "device", "requires_grad", "is_leaf")),
    *(_ADDRESS, _SHAPE, torch.Tensor.stride, torch.Tensor.is_conj, torch.Tensor.is_neg),
)

_Facts: TypeAlias = "list[list[Any]]"

_VALUES, _MEMBERS = methodcaller("values"), itemgetter("params")
_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")
_FUNCTIONS = attrgetter(*[f"{name}.__func__" for name in _METHODS])
_OF_MODULE = tuple([getattr(torch.nn.Module, name) for name in _METHODS])
_HOOKS = tuple(map(attrgetter, ("_state_dict_hooks", "_state_dict_pre_hooks")))
_PARTS = tuple(map(attrgetter, ("_parameters", "_buffers", "_modules")))
_UNSAVED, _VERSION = attrgetter("_non_persistent_buffers_set"), attrgetter("_version")

_OPTIMIZER_HOOKS = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
# Entries of a group that the look at an optimizer compares; the others may differ.
_COMPARED = ("params", "param_names")


class _KeptLeaves:
    """The leaves of plain tensors, valid while each tensor lies where it did, as it did.

    Not collective. Of the tensors it keeps alive no more than the memory of small ones.

    Args:
        tensors: Any, in any order.
        facts: Their `_plain_facts`.
        capture: Their leaves, as captured.
        homes: For each leaf the place of its tensor; None for one that never changes.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        facts: _Facts,
        capture: Capture,
        homes: Sequence[int | None],
    ) -> None:
        self._facts = facts
        self._specs: tuple[LeafSpec, ...] = capture.whole_specs
        leaves = capture.leaves
        numbered = list(enumerate(zip(leaves, homes, strict=True)))
        own = [(n, leaf, home) for n, (leaf, home) in numbered if home is not None]
        small = [
            (n, leaf)
            for n, leaf, home in own
            # The buffer of a tensor on a device is made anew: it follows the work so far.
            if leaf.spec.nbytes <= _KEPT_BYTES_MAX
            and tensors[home].is_cpu
            and type(leaf.buffer) is TensorBuffer
        ]
        if sum(leaf.spec.nbytes for _, leaf in small) > _ALL_KEPT_BYTES_MAX:
            small = []
        made = {n for n, _, _ in own} - {n for n, _ in small}
        self._made = [(n, leaf.spec, leaf.gate, home) for n, leaf, home in own if n in made]
        kept = [None if n in made else leaf for n, (leaf, _) in numbered]
        self._kept: Any = ManyLeaves(kept) if not made else kept
        # Views of the memory that the tensors had: their storages may have lost it since.
        self._views = [cast("TensorBuffer", leaf.buffer).tensor for _, leaf in small]
        self._addresses = list(map(_ADDRESS, self._views))

    def find(self, tensors: Sequence[torch.Tensor], structure: Structure) -> Capture | None:
        """Return their capture; None if a tensor has changed in more than its values.

        Args:
            tensors: As before, in the same order.
            structure: The JSON values of the capture.
        """
        if not is_ordinary() or _facts_of(tensors) != self._facts:
            return None
        if list(map(_ADDRESS, self._views)) != self._addresses:
            return None
        leaves = list(self._kept) if self._made else self._kept
        for number, spec, gate, home in self._made:
            leaves[number] = Leaf(spec, buffer_of(tensors[home].detach()), gate)
        return Capture.known(structure, leaves, self._specs, is_lasting=not self._made)


def _facts_of(tensors: Sequence[torch.Tensor]) -> _Facts | None:
    try:
        return [list(map(fact, tensors)) for fact in _TENSOR_FACTS]
    except RuntimeError:  # a sparse one has no address, a nested one no strides
        return None


def _plain_facts(tensors: Sequence[torch.Tensor]) -> _Facts | None:
    """Return the `_TENSOR_FACTS` of tensors; None if others count as well."""
    are_plain = is_ordinary() and set(map(type, tensors)) <= _PLAIN_TENSORS
    return _facts_of(tensors) if are_plain else None


class _Parts:
    """The parts of a module: its modules, parameters and buffers, each the same object.

    Not collective. It keeps none of them alive.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], look: list[Any]) -> None:
        self._modules = list(map(weakref.ref, modules))
        self._look = look

    @classmethod
    def of(cls, module: torch.nn.Module) -> tuple[_Parts, list[torch.Tensor]] | None:
        """Return the parts, and the parameters and buffers among them.

        None if a part is saved in its own way, or is unusual.
        """
        modules: list[Any] = list(module.modules())
        try:
            is_plain = all(_FUNCTIONS(one) == _OF_MODULE for one in modules)
            kinds = {type(of(one)) for of in _PARTS for one in modules}
            has_hooks = any(of(one) for of in _HOOKS for one in modules)
            if not is_plain or has_hooks or not kinds <= {dict, OrderedDict}:
                return None
            look, tensors = _look_at(modules)
        except AttributeError:  # a function of an object's own, a module of another kind
            return None
        return cls(modules, look), tensors

    def find(self) -> list[torch.Tensor] | None:
        """Return parameters and buffers; None if any part is another than before."""
        modules = [module() for module in self._modules]
        if any(map(is_, modules, repeat(None))):
            return None
        try:
            look, tensors = _look_at(modules)
        except AttributeError:
            return None
        return tensors if look == self._look else None


def _look_at(modules: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]]:
    """Return all that a walk through modules depends on, and their tensors."""
    parts = [list(map(of, modules)) for of in _PARTS]
    every = list(chain.from_iterable(parts))
    values = list(chain.from_iterable(map(_VALUES, every)))
    look = [
        list(map(type, modules)),
        list(map(_FUNCTIONS, modules)),
        list(map(_VERSION, modules)),
        list(map(frozenset, map(_UNSAVED, modules))),
        [any(map(of, modules)) for of in _HOOKS],
        list(map(len, every)),
        list(chain.from_iterable(every)),
        list(map(id, values)),
    ]
    tensors = values[: sum(map(len, chain.from_iterable(parts[:2])))]
    return look, [value for value in tensors if value is not None]


class KeptModule:
    """The capture of a module, valid while neither its parts nor their memory change.

    Not collective.
    """

    def __init__(self, parts: _Parts, leaves: _KeptLeaves, structure: Structure) -> None:
        self._parts, self._leaves, self._structure = parts, leaves, structure

    @classmethod
    def of(
        cls, module: torch.nn.Module, values: Mapping[str, torch.Tensor], capture: Capture
    ) -> KeptModule | None:
        """Return a capture to keep; None if a change of the module could pass unseen.

        Args:
            module: The module.
            values: Its tensors by name.
            capture: Its capture.
        """
        found = _Parts.of(module)
        if found is None:
            return None
        parts, tensors = found
        facts = _plain_facts(tensors)
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        homes = [places.get(id(values.get(name))) for name in capture.names]
        if facts is None or None in homes:
            return None
        leaves = _KeptLeaves(tensors, facts, capture, homes)
        return cls(parts, leaves, capture.structure)

    def find(self) -> Capture | None:
        """Return the capture of the module now; None if only a walk can tell."""
        tensors = self._parts.find()
        return None if tensors is None else self._leaves.find(tensors, self._structure)


class KeptOptimizer:
    """The capture of an optimizer, valid while only values and hyperparameters change.

    Not collective.
    """

    def __init__(
        self,
        parts: _Parts | None,
        look: list[Any],
        leaves: _KeptLeaves,
        structure: Structure,
    ) -> None:
        self._parts, self._look = parts, look
        self._leaves, self._structure = leaves, structure

    @classmethod
    def of(
        cls,
        optimizer: Any,  # noqa: ANN401
        module: torch.nn.Module | None,
        values: Mapping[str, Any],
        capture: Capture,
    ) -> KeptOptimizer | None:
        """Return a capture to keep; None if a change of the optimizer could pass unseen.

        Args:
            optimizer: The optimizer.
            module: The module that names its parameters.
            values: The values of its leaves, by name.
            capture: Its capture.
        """
        named = None if module is None else _Parts.of(module)
        found = _look_into(optimizer)
        if found is None or (module is not None and named is None):
            return None
        look, tensors = found
        parts = named and named[0]
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        homes = [places.get(id(values[name])) for name in capture.names]
        # Lists of numbers, shapes and names are leaves, if they are long.
        pairs = zip(capture.names, homes, strict=True)
        others = [values[name] for name, home in pairs if home is None]
        groups = capture.structure["content"]["param_groups"]
        is_known = _groups_now(optimizer, groups) is not None
        facts = _plain_facts(tensors)
        if not is_known or facts is None or any(map(torch.is_tensor, others)):
            return None
        leaves = _KeptLeaves(tensors, facts, capture, homes)
        return cls(parts, look, leaves, capture.structure)

    def find(self, optimizer: Any) -> Capture | None:  # noqa: ANN401
        """Return the capture of the optimizer now; None if only a walk can tell."""
        found = _look_into(optimizer)
        if found is None or found[0] != self._look:
            return None
        if self._parts is not None and self._parts.find() is None:
            return None
        known = self._structure["content"]
        groups = _groups_now(optimizer, known["param_groups"])
        if groups is None:
            return None
        content = {**known, "param_groups": groups}
        return self._leaves.find(found[1], {**self._structure, "content": content})


def _look_into(optimizer: Any) -> tuple[list[Any], list[torch.Tensor]] | None:  # noqa: ANN401
    """Return all that a walk through an optimizer depends on, and the tensors in it.

    All but the hyperparameters; None if it has a state dict of its own form.
    """
    kind, groups, state = type(optimizer), optimizer.param_groups, optimizer.state
    is_torchs = getattr(kind, "state_dict", None) is torch.optim.Optimizer.state_dict
    if not is_torchs or "state_dict" in vars(optimizer):
        return None
    if any(getattr(optimizer, name, None) for name in _OPTIMIZER_HOOKS):
        return None
    entries = list(state.values())
    # Keys are compared as objects, so no number or text may be among them.
    if not set(map(type, state)) <= _PLAIN_TENSORS:
        return None
    if not set(map(type, chain(groups, entries))) <= {dict}:
        return None
    values = list(chain.from_iterable(map(_VALUES, entries)))
    are_tensors = list(map(_PLAIN_TENSORS.__contains__, map(type, values)))
    tensors = list(compress(values, are_tensors))
    others = list(compress(values, map(not_, are_tensors)))
    if not set(map(type, others)) <= _PLAIN_VALUES:
        return None
    members = list(map(_MEMBERS, groups))
    params = list(chain.from_iterable(members))
    look = [
        kind,
        list(map(list, groups)),
        [list(group.get("param_names") or ()) for group in groups],
        list(map(len, members)),
        list(map(id, params)),
        list(map(_SHAPE, params)),
        list(map(id, state)),
        list(map(len, entries)),
        list(chain.from_iterable(entries)),
        are_tensors,
        list(map(repr, others)),  # not themselves: 1 is True, and 0.0 is -0.0
        list(map(id, tensors)),
    ]
    return look, tensors


def _groups_now(optimizer: Any, known: Sequence[Any]) -> list[Any] | None:  # noqa: ANN401
    """Return the JSON values of an optimizer's groups; None if a walk must find them.

    Args:
        optimizer: The optimizer.
        known: The JSON values from the last walk.
    """
    groups = []
    for number, (group, node) in enumerate(zip(optimizer.param_groups, known, strict=True)):
        given = {key: value for key, value in group.items() if key not in _COMPARED}
        try:
            found = flatten(given, f"content/param_groups/{number}")
        except StageError:  # the walk raises it too
            return None
        if found.leaves or KIND in node or KIND in found.structure:
            return None
        # In the order of the walk: ranks compare the text of their structures.
        groups.append({key: found.structure.get(key, node[key]) for key in node})
    return groups
