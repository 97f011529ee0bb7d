# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.states.module import ModuleState
from tests.making import carry


def module_state(module: nn.Module) -> ModuleState:
    return ModuleState("model", module)


def names(module: nn.Module) -> list[str]:
    return [leaf.spec.name for leaf in module_state(module).capture().leaves]


def fill(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


class Net(nn.Module):
    """Frozen, unused and 0-dim parameters, buffers of both kinds, odd layouts."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.unused = nn.Parameter(torch.zeros(()))
        self.nothing = nn.Parameter(torch.zeros(0, 5))
        self.narrow = nn.Parameter(torch.zeros(4, 2, dtype=torch.bfloat16).t())
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        fill(self, seed)


def test_parameters_and_buffers_return_in_place():
    saved, live = Net(1), Net(2)
    before = {
        name: (id(tensor), tensor.data_ptr(), tensor.stride())
        for name, tensor in live.state_dict(keep_vars=True).items()
    }
    scratch = live.scratch.clone()
    carry(module_state(saved), module_state(live))
    for name, tensor in live.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, saved.state_dict()[name]), name
        assert (id(tensor), tensor.data_ptr(), tensor.stride()) == before[name]
    assert torch.equal(live.scratch, scratch)
    assert [p.requires_grad for p in live.parameters()] == [
        p.requires_grad for p in saved.parameters()
    ]


def test_every_entry_of_the_state_dict_is_a_leaf_and_no_other():
    assert names(Net()) == list(Net().state_dict())
    assert "scratch" not in names(Net())


def test_optimizers_keep_their_references():
    live = Net(2)
    optimizer = torch.optim.SGD(live.parameters(), lr=1.0)
    carry(module_state(Net(1)), module_state(live))
    live.conv.weight.grad = torch.ones_like(live.conv.weight)
    optimizer.step()
    assert torch.equal(live.conv.weight, Net(1).conv.weight - 1)


class Tied(nn.Module):
    def __init__(self, tied: bool, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        fill(self, seed)


def test_tied_parameters_are_saved_once_and_stay_tied():
    assert names(Tied(True)) == ["embed.weight"]
    live = Tied(True, seed=2)
    carry(module_state(Tied(True, seed=1)), module_state(live))
    assert live.head.weight is live.embed.weight
    assert torch.equal(live.head.weight, Tied(True, seed=1).embed.weight)


def test_tied_when_saved_and_apart_now_each_get_the_value():
    live = Tied(False, seed=2)
    carry(module_state(Tied(True, seed=1)), module_state(live))
    assert live.head.weight is not live.embed.weight
    for weight in (live.head.weight, live.embed.weight):
        assert torch.equal(weight, Tied(True, seed=1).embed.weight)


class Named(nn.Module):
    """Parameters in the order of their names, some of them one and the same."""

    def __init__(self, names: str, *ties: str, value: float = 0.0) -> None:
        super().__init__()
        one_of = {name: tie for tie in ties for name in tie}
        made = {tie: nn.Parameter(torch.full((2,), value)) for tie in ties}
        for name in names:
            apart = nn.Parameter(torch.full((2,), value))
            setattr(self, name, made[one_of[name]] if name in one_of else apart)


@pytest.mark.parametrize(
    ("names", "ties"),
    [("cab", ["abc"]), ("bca", ["abc"]), ("cab", ["bc"]), ("bca", ["ac"]), ("cab", [])],
)
def test_tied_parameters_in_another_order_or_partly_apart(names, ties):
    live = Named(names, *ties)
    carry(module_state(Named("abc", "abc", value=3.0)), module_state(live))
    assert all((param == 3).all() for param in live.parameters())


@pytest.mark.parametrize("names", ["abcd", "dcba"])
def test_ties_across_those_of_the_checkpoint_are_a_mismatch(names):
    live = Named(names, "ac", "bd")
    with pytest.raises(StateMismatchError, match="is tied to"):
        carry(module_state(Named("abcd", "ab", "cd", value=3.0)), module_state(live))
    assert not any(param.any() for param in live.parameters())


def test_apart_when_saved_and_tied_now_is_a_mismatch():
    live = Tied(True, seed=2)
    with pytest.raises(StateMismatchError, match=r"head\.weight is saved|tied to embed"):
        carry(module_state(Tied(False, seed=1)), module_state(live))
    assert torch.equal(live.embed.weight, Tied(True, seed=2).embed.weight)


def test_tied_to_another_now_is_a_mismatch():
    class Three(nn.Module):
        def __init__(self, source: str) -> None:
            super().__init__()
            self.a, self.c = (nn.Parameter(torch.full((2,), v)) for v in (1.0, 3.0))
            self.b = getattr(self, source)

    live = Three("c")
    with pytest.raises(StateMismatchError, match="b is tied to c in the program, to a in"):
        carry(module_state(Three("a")), module_state(live))
    assert live.b.tolist() == [3, 3]


def test_tied_parameter_of_another_shape_is_a_mismatch():
    live = Tied(False)
    live.head.weight = nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(StateMismatchError, match=r"head\.weight: saved as"):
        carry(module_state(Tied(True)), module_state(live))


def test_parameter_that_was_tied_and_is_gone_is_a_mismatch():
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)

    with pytest.raises(
        StateMismatchError, match=r"head\.weight is saved, the program has no"
    ):
        carry(module_state(Tied(True)), module_state(Small()))


def test_views_of_one_memory_are_not_tied():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.arange(6.0)
            self.first = nn.Parameter(memory[:3])
            self.last = nn.Parameter(memory[3:])
            self.wide = nn.Parameter(memory[:4])

    assert names(Views()) == ["first", "last", "wide"]


class Conjugates(nn.Module):
    """Buffers that are views of one memory, and are conjugated or negated when read."""

    def __init__(self, value: complex, *, views: bool) -> None:
        super().__init__()
        self.register_buffer("plain", torch.full((2,), value))
        lazy = {"conj": self.plain.conj(), "neg": self.plain.conj().imag}
        for name, view in lazy.items():
            self.register_buffer(name, view if views else view.clone().resolve_neg())

    @property
    def numbers(self) -> list[complex]:
        return [self.plain[0].item(), self.conj[0].item(), self.neg[0].item()]


@pytest.mark.parametrize("views", [True, False])
def test_views_that_are_read_in_another_way_are_not_tied(views):
    saved, live = Conjugates(1 + 2j, views=True), Conjugates(3 - 1j, views=views)
    assert names(saved) == ["plain", "conj", "neg"]
    carry(module_state(saved), module_state(live))
    assert live.numbers == [1 + 2j, 1 - 2j, -2]


def test_empty_parameters_are_not_taken_for_tied():
    module = nn.ParameterList([torch.zeros(0), torch.zeros(0)])
    assert names(module) == ["0", "1"]


class Odd(torch.Tensor):
    """A tensor whose making did not foresee that anybody asks for its place."""

    def detach(self):
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        lambda: torch.ones(2).as_subclass(Odd),
    ],
    ids=["nested", "odd"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_cannot_even_be_looked_at_are_refused_by_name(make):
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].register_buffer("ragged", make())
    with pytest.raises(StageError, match=r"0\.ragged.* cannot be saved"):
        module_state(module).capture()


class WithExtra(nn.Module):
    def __init__(self, extra) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state) -> None:
        self.extra = state


def test_extra_state_of_any_form_returns_at_every_depth():
    def make(fresh: bool) -> nn.Module:
        inner = None if fresh else {"n": 3, "t": torch.arange(4), "a": np.float32(2.5)}
        outer = nn.Sequential(
            WithExtra(inner), nn.Sequential(WithExtra(None if fresh else "x"))
        )
        return nn.ModuleDict({"net": outer, "root": WithExtra(7 if fresh else (1, None))})

    live = make(fresh=True)
    carry(module_state(make(fresh=False)), module_state(live))
    first = live["net"][0].extra
    assert first["n"] == 3
    assert first["t"].tolist() == [0, 1, 2, 3]
    assert first["a"] == np.float32(2.5)
    assert live["net"][1][0].extra == "x"
    assert live["root"].extra == (1, None)


def test_extra_state_of_the_module_itself_returns():
    live = WithExtra(None)
    carry(module_state(WithExtra({"a": 1})), module_state(live))
    assert live.extra == {"a": 1}


class Computes(nn.Module):
    """Keeps a number of its own that only its state dict shows as a tensor."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.value = value

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "value"] = torch.tensor([self.value])
        destination[prefix + "twice"] = torch.tensor([self.value * 2])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Wants several entries at once.
        assert state_dict[prefix + "weight"] is not None
        total = state_dict.pop(prefix + "value") + state_dict.pop(prefix + "twice")
        self.value = total.item() / 3
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_what_a_module_computes_for_its_state_dict_is_given_back():
    live = nn.Sequential(Computes(5.0))
    carry(module_state(nn.Sequential(Computes(2.0))), module_state(live))
    assert live[0].value == 2.0
    assert live[0].weight.tolist() == [2, 2]


def test_computed_entries_that_a_module_does_not_take_back_are_told():
    live = nn.Linear(2, 2)
    live.register_state_dict_post_hook(
        lambda module, state_dict, prefix, _: state_dict.update(
            {f"{prefix}norm": torch.ones(1)}
        )
    )
    with pytest.raises(StateMismatchError, match="norm"):
        carry(module_state(live), module_state(live))


def test_entries_that_a_hook_removes_are_neither_saved_nor_missed():
    def without_bias(seed: int) -> nn.Module:
        module = fill(nn.Linear(2, 2), seed)

        def remove(_, state, prefix, __) -> None:
            del state[f"{prefix}bias"]

        module.register_state_dict_post_hook(remove)
        return module

    live = without_bias(2)
    bias = live.bias.clone()
    assert names(live) == ["weight"]
    carry(module_state(without_bias(1)), module_state(live))
    assert torch.equal(live.weight, without_bias(1).weight)
    assert torch.equal(live.bias, bias)


def test_hook_that_detaches_everything_changes_nothing():
    def detached(seed: int) -> nn.Module:
        module = fill(nn.Linear(2, 2), seed)

        def detach(_, state, __, ___) -> None:
            state.update({key: value.detach() for key, value in state.items()})

        module.register_state_dict_post_hook(detach)
        return module

    live = detached(2)
    weight = live.weight
    carry(module_state(detached(1)), module_state(live))
    assert live.weight is weight
    assert torch.equal(live.weight, detached(1).weight)


def test_parametrized_modules_return():
    def normed(seed: int) -> nn.Module:
        return fill(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), seed)

    live = normed(2)
    carry(module_state(normed(1)), module_state(live))
    assert torch.equal(live.weight, normed(1).weight)


@pytest.mark.parametrize("kind", [nn.LazyLinear, nn.LazyBatchNorm1d, nn.LazyInstanceNorm1d])
@pytest.mark.parametrize("inside", [True, False])
def test_layers_without_a_shape_yet_get_the_saved_one(kind, inside):
    def layer():
        if kind is nn.LazyLinear:
            return kind(2)
        return kind(affine=True, track_running_stats=True)

    saved, live = layer(), layer()
    saved(torch.randn(3, 4, 5))
    if inside:
        saved, live = nn.Sequential(saved), nn.Sequential(live)
    carry(module_state(saved), module_state(live))
    ours, theirs = live.state_dict(), saved.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_all_mismatches_are_told_at_once_and_nothing_is_changed():
    saved = nn.ModuleDict(
        {"same": nn.Linear(2, 2), "wide": nn.Linear(3, 2), "old": nn.Linear(1, 1)}
    )
    live = nn.ModuleDict(
        {"same": nn.Linear(2, 2), "wide": nn.Linear(4, 2), "new": nn.Linear(1, 1)}
    )
    live["same"].bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    with pytest.raises(StateMismatchError) as caught:
        carry(module_state(fill(saved, 1)), module_state(live))
    problems = "\n".join(caught.value.problems)
    for name in (
        "same.bias",
        "wide.weight",
        "old.weight",
        "old.bias",
        "new.weight",
        "new.bias",
    ):
        assert problems.count(name) >= 1
    assert len(caught.value.problems) == 6
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "structure",
    [None, 5, [], {}, {"ties": {}}, {"ties": 5, "extra": {}}, {"ties": [1], "extra": {}}],
    ids=str,
)
def test_structures_of_other_states_are_a_mismatch(structure):
    with pytest.raises(StateMismatchError, match="not saved from a module"):
        module_state(nn.Linear(1, 1)).prepare(structure, [], strict=True)


def test_module_without_parameters_is_no_trouble():
    carry(module_state(nn.ReLU()), module_state(nn.ReLU()))
