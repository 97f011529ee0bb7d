# SPDX-License-Identifier: Apache-2.0
"""Modules and optimizers, drawn: a plan first, from which several alike are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import PerChannelMinMaxObserver
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Doubled(nn.Module):
    """A parametrization with a way back, and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor.to(x.dtype)

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.factor.to(x.dtype)


class Remembers(nn.Module):
    """Extra state, that only the module itself can take back."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


class Buffers(nn.Module):
    """Buffers of many kinds, one that is not saved; odd parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(4).reshape(2, 2).t())
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("none", None)
        self.scalar = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 2))


class Derives(nn.Module):
    """A number that only its state dict shows, and only its loading takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.count = 0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}count"] = torch.tensor(self.count)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.count = int(state_dict.pop(f"{prefix}count"))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def hooked() -> nn.Module:
    """Return a layer whose state dict has another name for a weight, by hooks."""
    layer = nn.Linear(2, 2)

    def rename(_: Any, state: Any, prefix: str, __: Any) -> None:
        state[f"{prefix}old"] = state.pop(f"{prefix}weight")

    def back(module: Any, state: Any, prefix: str, *_: Any) -> None:
        if f"{prefix}old" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}old")

    layer.register_state_dict_post_hook(rename)
    layer.register_load_state_dict_pre_hook(back)
    return layer


def shared() -> nn.Module:
    """Return two layers over one weight, and one layer under two names."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    return nn.ModuleDict({"first": first, "second": second, "again": first})


def views() -> nn.Module:
    """Return a module whose parameters and buffers are parts of one memory."""
    memory, module = torch.zeros(6), nn.Module()
    module.first = nn.Parameter(memory[:3])
    module.last = nn.Parameter(memory[3:])
    module.register_buffer("most", memory[1:5])
    return module


def with_buffer(value: torch.Tensor) -> nn.Module:
    module = nn.Sequential(nn.Linear(1, 1))
    module.register_buffer("odd", value)
    return module


def parametrized() -> nn.Module:
    layer = nn.Linear(2, 3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(3, 2),
    "conv": lambda: nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last),
    "norm": lambda: nn.BatchNorm1d(2),
    "untracked": lambda: nn.BatchNorm1d(2, affine=False, track_running_stats=False),
    "lstm": lambda: nn.LSTM(2, 2),
    "attention": lambda: nn.MultiheadAttention(2, 1),
    "embedding": lambda: nn.Embedding(3, 2, padding_idx=0),
    "nothing": nn.Dropout,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(2, 2)),
    "parametrized": parametrized,
    "buffers": Buffers,
    "derives": Derives,
    "hooked": hooked,
    "shared": shared,
    "averaged": lambda: AveragedModel(nn.Linear(2, 1)),
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 1)),
    "observer": PerChannelMinMaxObserver,
    "pruned": lambda: prune.random_unstructured(nn.Linear(2, 2), "weight", 1),
    "views": views,
    "expanded": lambda: with_buffer(torch.tensor([7]).expand(3)),
    "sparse": lambda: with_buffer(torch.eye(2).to_sparse()),
    "lazy": lambda: nn.LazyLinear(2),
    "lazy norm": nn.LazyBatchNorm1d,
}
REFUSED = {"expanded", "sparse", "lazy", "lazy norm"}
"""Of which each has a leaf that nobody could bring back."""

EXTRAS = [None, 3, "text", (1, [2.5]), {"t": torch.arange(3), 5: None}, object()]


@dataclass(frozen=True)
class Plan:
    """A tree of modules, of which several alike can be made.

    Attributes:
        kind: Of `LAYERS`, ``"extra"`` and a place in `EXTRAS`, or a container.
        parts: What a container holds.
        number: Place in `EXTRAS`, or of a dtype.
    """

    kind: str
    parts: tuple[Plan, ...] = ()
    number: int = 0

    def make(self, seed: int) -> nn.Module:
        """Make a module; another seed, other numbers in it."""
        module = self._make(fresh=seed > 1)
        stream = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if can_be_filled(tensor):
                    drawn = torch.rand(tensor.shape, generator=stream) * 5
                    tensor.copy_(drawn)
        for number, part in enumerate(module.modules()):
            if isinstance(part, PerChannelMinMaxObserver) and seed == 1:
                part(torch.rand(3, 3, generator=stream))  # a fresh one has other shapes
            if isinstance(part, Derives):
                part.count = seed * 100 + number
        return module

    def _make(self, *, fresh: bool) -> nn.Module:
        parts = [part._make(fresh=fresh) for part in self.parts]
        if self.kind == "sequential":
            return nn.Sequential(*parts)
        if self.kind == "list":
            return nn.ModuleList(parts)
        if self.kind == "dict":
            return nn.ModuleDict({f"k{n}": part for n, part in enumerate(parts)})
        if self.kind == "twice":  # one module in two places
            return nn.ModuleList([*parts, *parts])
        if self.kind == "extra":
            return Remembers(None if fresh else EXTRAS[self.number])
        if self.kind == "dtype":
            return nn.Sequential(*parts).to(DTYPES[self.number])
        layer: nn.Module = LAYERS[self.kind]()
        return layer

    @property
    def is_refused(self) -> bool:
        """Whether something in it could not be brought back."""
        odd = self.kind == "extra" and type(EXTRAS[self.number]) is object
        return odd or self.kind in REFUSED or any(part.is_refused for part in self.parts)


def can_be_filled(tensor: torch.Tensor) -> bool:
    if is_lazy(tensor) or tensor.is_sparse:
        return False
    return 0 not in tensor.stride() and tensor.numel() > 0


PLANS = st.recursive(
    st.sampled_from(sorted(LAYERS)).map(Plan)
    | st.integers(0, len(EXTRAS) - 1).map(lambda n: Plan("extra", (), n)),
    lambda inner: st.builds(
        Plan,
        st.sampled_from(["sequential", "list", "dict", "twice", "dtype"]),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
        st.integers(0, len(DTYPES) - 1),
    ),
    max_leaves=6,
)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {"fused": True},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Rprop": {},
    "Adafactor": {},
}


@dataclass(frozen=True)
class Tuning:
    """An optimizer over the parameters of a module, by name.

    Attributes:
        kind: Of `OPTIMIZERS`.
        groups: Names of parameters, group by group, in the order that they are given in.
        rate: Of the first group; that of the others is a part of it.
        tensor_rate: Whether it is a tensor.
        told: Whether the optimizer itself is told the names.
    """

    kind: str
    groups: tuple[tuple[str, ...], ...]
    rate: float
    tensor_rate: bool
    told: bool

    def make(self, module: nn.Module) -> torch.optim.Optimizer:
        there = dict(module.named_parameters())
        groups = []
        for number, names in enumerate(self.groups):
            rate: Any = self.rate / (number + 1)
            groups.append(
                {
                    "params": [
                        (name, there[name]) if self.told else there[name] for name in names
                    ],
                    "lr": torch.tensor(rate) if self.tensor_rate else rate,
                }
            )
        made: torch.optim.Optimizer = getattr(torch.optim, self.kind)(
            groups, **OPTIMIZERS[self.kind]
        )
        return made


@st.composite
def tunings(draw: Any, module: nn.Module) -> Tuning:
    """Draw an optimizer over some parameters of a module, in any groups and order."""
    names = [
        name
        for name, param in module.named_parameters()
        if param.requires_grad and param.numel()
    ]
    chosen = draw(st.permutations(names))[: draw(st.integers(1, len(names)))]
    cut = draw(st.integers(0, len(chosen) - 1))
    groups = tuple(tuple(g) for g in (chosen[:cut], chosen[cut:]) if g)
    return Tuning(
        draw(st.sampled_from(sorted(OPTIMIZERS))),
        groups,
        draw(st.sampled_from([0.5, 0.125])),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@st.composite
def regrouped(draw: Any, tuning: Tuning) -> Tuning:
    """Draw the same optimizer with its parameters in another order within the groups."""
    groups = tuple(tuple(draw(st.permutations(group))) for group in tuning.groups)
    return replace(tuning, groups=groups, rate=tuning.rate / 2)
