# SPDX-License-Identifier: Apache-2.0
"""Inspects a live module: its entries, and how each can be restored."""

from __future__ import annotations

import copy
import inspect
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StageError
from mpi_ckpt.states.dtensor import local_tensor
from mpi_ckpt.states.leaf_values import takes_bytes
from mpi_ckpt.states.tree import Flattened, flatten
from mpi_ckpt.states.wrappers import inner_names, is_dtensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    import torch

    from mpi_ckpt.leaves.leaf import Leaf
    from mpi_ckpt.states.buffers.array_bytes import ReadonlyMemory

EXTRA = "_extra_state"


class ModuleContents:
    """A module's state dict, sorted by how its entries are restored.

    Not collective. Names are without those of wrappers.

    Args:
        module: Any module.
        memory: The read-only memory; None to skip that check.

    Attributes:
        leaves: The tensors, tied ones once.
        ties: Name of a tied tensor -> its name in ``leaves``.
        parameters: Names of leaves that are parameters.
        values: The tensors by name, with every name of tied ones.
        computed: Names of leaves that a hook of the module makes on request, so that
            writing into them is not enough.
        lazy: Names of leaves that have no shape yet.
        fixed: Name of a leaf that bytes cannot be written into -> why.
        extra: All entries that are not tensors, flattened together.
        extra_names: Their names.
        outer: Name -> the name with those of wrappers.
        versions: Versions by which the modules recognize their own older formats.
    """

    def __init__(
        self, module: torch.nn.Module, memory: ReadonlyMemory | None = None
    ) -> None:
        # Import once: an import statement takes a microsecond for each of thousands of
        # leaves.
        from torch.nn.parameter import is_lazy

        from mpi_ckpt.states.tensors import tensor_leaf

        self._is_lazy, self._tensor_leaf = is_lazy, tensor_leaf
        self._memory = memory
        self.leaves: dict[str, Leaf] = {}
        self.ties: dict[str, str] = {}
        self.parameters: set[str] = set()
        self.values: dict[str, torch.Tensor] = {}
        self.computed: list[str] = []
        self.lazy: list[str] = []
        self.fixed: dict[str, str] = {}
        self.outer: dict[str, str] = {}
        inner = inner_names(module)
        entries = _state_dict(module)
        self.versions: dict[str, dict[str, Any]] = {
            inner(f"{path}.")[:-1] if path else path: dict(of_module)
            for path, of_module in getattr(entries, "_metadata", {}).items()
        }
        self._parameters, self._live = _identities(module, entries)
        self._first: dict[tuple[Any, ...], str] = {}
        extra: dict[str, Any] = {}
        for outer, value in entries.items():
            name = inner(outer)
            self.outer[name] = outer
            if _is_tensor(value) and name.rpartition(".")[2] != EXTRA:
                self._add_named(name, value)
            else:
                extra[name] = value
        self.extra_names = tuple(extra)
        self.extra: Flattened = flatten(extra, "#extra")

    def _add_named(self, name: str, value: torch.Tensor) -> None:
        try:
            self._add(name, value)
        except StageError:
            raise
        except Exception as error:  # an error of another package's tensor
            raise StageError(
                f"{name}, a {type(value).__qualname__}, cannot be saved: {error!r}"
            ) from error

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.values[name] = value
        if self._is_lazy(value):
            self.lazy.append(name)
            return
        # First, since it also refuses tensors without an identity: a nested tensor has no
        # shape.
        leaf = self._tensor_leaf(name, value)
        identity = _identity(value)
        source = self._first.setdefault(identity, name)
        if source != name:
            self.ties[name] = source
            return
        self.leaves[name] = leaf
        if not takes_bytes(value):
            self.fixed[name] = "overlaps itself in memory, as after expand()"
        elif self._memory and _lies_in(self._memory, value):
            self.fixed[name] = "lies in memory that may only be read, as of a mapped file"
        if id(value) in self._parameters or identity in self._parameters:
            self.parameters.add(name)
        elif id(value) not in self._live and identity not in self._live:
            self.computed.append(name)

    def tie_to(self, names: Collection[str]) -> None:
        """Let leaves have the names of a checkpoint: another order has other first names.

        Not collective.

        Args:
            names: Names of the saved leaves.
        """
        for name in names:
            source = self.ties.get(name)
            if source is None or source in names:
                continue
            leaf = self.leaves.pop(source)
            self.leaves[name] = replace(leaf, spec=replace(leaf.spec, name=name))
            del self.ties[name]
            self.ties = {k: name if of == source else of for k, of in self.ties.items()}
            self.ties[source] = name
            if source in self.fixed:
                self.fixed[name] = self.fixed.pop(source)
            self.computed = [name if one == source else one for one in self.computed]

    def require_savable(self) -> None:
        """Refuse leaves that could be saved but not restored. Not collective.

        Raises:
            StageError: On the calling rank, with every such leaf.
        """
        problems = [
            f"{name} {why}: bytes cannot be put back into it; register a clone() of it"
            for name, why in self.fixed.items()
            if name not in self.computed
        ]
        problems += [
            f"{name} has no shape yet: run the module once before the first save"
            for name in self.lazy
        ]
        if problems:
            raise StageError("\n    ".join(problems), problems=problems)


def loads_itself(module: torch.nn.Module) -> bool:
    """Return whether a module changes how it is loaded.

    Not collective. By a hook or an override of the module itself, not of its parts.
    """
    import torch

    kind, base = type(module), torch.nn.Module
    own: Any = kind._load_from_state_dict  # noqa: SLF001 (what torch has modules override)
    # Normalization overrides it only to read the state of its older versions.
    norm: Any = torch.nn.modules.batchnorm._NormBase  # noqa: SLF001
    plain = (base._load_from_state_dict, norm._load_from_state_dict)  # noqa: SLF001
    return bool(
        own not in plain
        or kind.load_state_dict is not base.load_state_dict
        or getattr(module, "_load_state_dict_pre_hooks", None)
        or getattr(module, "_load_state_dict_post_hooks", None)
    )


def try_loading(
    module: torch.nn.Module, values: Mapping[str, Any], *, strict: bool
) -> str | None:
    """Load values into a copy of a module; return its error, if any.

    Not collective. The module itself is not changed.

    Args:
        module: A module that loads itself.
        values: The arriving values, or values of the same form, by name within the module.
        strict: Whether it must accept all values, and miss none.
    """
    import torch

    # torch copies no buffer without a shape.
    is_lazy: Callable[[Any], bool] = torch.nn.parameter.is_lazy
    lazy: dict[int, Any] = {
        id(buffer): _without_shape(buffer) for buffer in module.buffers() if is_lazy(buffer)
    }
    try:
        trial = copy.deepcopy(module, lazy)
        with torch.no_grad():
            trial.load_state_dict(dict(values), strict=strict)
    except Exception as error:
        return str(error)
    return None


def _without_shape(like: Any) -> Any:  # noqa: ANN401 (a buffer without a shape yet)
    return type(like)(device=like.device, dtype=like.dtype)


def owners(module: torch.nn.Module, name: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules that contain an entry, by path, the innermost last.

    Not collective.

    Args:
        module: The outermost module.
        name: Name of the entry, with the names of wrappers; unknown parts are skipped.
    """
    path, owner = "", module
    yield path, owner
    for part in name.split(".")[:-1]:
        inside = getattr(owner, "_modules", {}).get(part)
        if inside is None:
            return
        path, owner = f"{path}.{part}" if path else part, inside
        yield path, owner


def _state_dict(module: Any) -> Mapping[str, Any]:  # noqa: ANN401
    # Older modules have their own state_dict() without arguments.
    takes = inspect.signature(module.state_dict).parameters.values()
    if any(
        parameter.name == "keep_vars" or parameter.kind is parameter.VAR_KEYWORD
        for parameter in takes
    ):
        found: Mapping[str, Any] = module.state_dict(keep_vars=True)
        return found
    plain: Mapping[str, Any] = module.state_dict()
    return plain


def _identities(
    module: torch.nn.Module, entries: Mapping[str, Any]
) -> tuple[set[Any], set[Any]]:
    """Return the identities of parameters, and those of all live tensors."""
    parameters: set[Any] = set(map(id, module.parameters()))
    live = parameters | set(map(id, module.buffers()))
    if live and not any(id(value) in live for value in entries.values()):
        # Tensors over the same memory, as from a detaching state_dict(), are found by their
        # memory.
        parameters = set(map(_identity, module.parameters()))
        live = parameters | set(map(_identity, module.buffers()))
    return parameters, live


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _lies_in(memory: ReadonlyMemory, tensor: torch.Tensor) -> bool:
    local = local_tensor(tensor)
    return local.is_cpu and local.data_ptr() in memory


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for two tensors over the same memory, read alike."""
    torch = sys.modules["torch"]
    is_lazy = torch.nn.parameter.is_lazy
    # The address of a DTensor is always zero, and that of its local part says nothing on a
    # rank whose part is empty: ties must be the same on all ranks.
    if is_dtensor(tensor) or is_lazy(tensor):
        return (id(tensor),)
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return (id(tensor),)
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        # Views that conjugate or negate when they are read have other values there.
        tensor.is_conj(),
        tensor.is_neg(),
    )
