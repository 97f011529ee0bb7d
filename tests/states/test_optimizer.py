# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.states.module import ModuleState
from mpi_ckpt.states.optimizer import OptimizerState
from tests.making import carry

KINDS = {
    "SGD": {"lr": 0.1},
    "SGD momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "SGD maximize": {"lr": 0.1, "maximize": True, "weight_decay": 0.1},
    "Adam": {"lr": 0.1},
    "Adam foreach": {"lr": 0.1, "foreach": True},
    "Adam fused": {"lr": 0.1, "fused": True},
    "Adam tensor": {"lr": torch.tensor(0.1)},
    "AdamW": {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.1},
    "Adadelta": {},
    "Adamax": {},
    "Adafactor": {},
    "ASGD": {},
    "LBFGS": {"lr": 0.1, "max_iter": 3, "line_search_fn": "strong_wolfe"},
    "Muon": {"lr": 0.1},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Rprop": {},
}
TESTED = [kind for kind in KINDS if hasattr(torch.optim, kind.split()[0])]


class Net(nn.Module):
    """Matrices only, as Muon wants; one is frozen and one never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4, bias=False)
        self.second = nn.Linear(4, 2, bias=False)
        self.unused = nn.Parameter(torch.zeros(2, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def make(kind: str) -> tuple[Net, torch.optim.Optimizer]:
    net = Net()
    given = {k: v.clone() if torch.is_tensor(v) else v for k, v in KINDS[kind].items()}
    return net, getattr(torch.optim, kind.split()[0])(net.parameters(), **given)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = net(batch).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def restore(saved: tuple, live: tuple) -> None:
    carry(ModuleState("model", saved[0]), ModuleState("model", live[0]))
    carry(OptimizerState("optimizer", saved[1]), OptimizerState("optimizer", live[1]))


def same_parameters(net: nn.Module, other: nn.Module) -> bool:
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("trained_before", [0, 2])
@pytest.mark.parametrize("kind", TESTED)
def test_next_steps_are_those_of_an_uninterrupted_run(kind, trained_before, monkeypatch):
    saved, live = make(kind), make(kind)
    train(*saved, range(3))
    train(*live, range(100, 100 + trained_before))
    with monkeypatch.context() as patch:
        patch.setattr(type(live[1]), "step", lambda *_: pytest.fail("a step was taken"))
        restore(saved, live)
    assert same_parameters(saved[0], live[0])
    train(*saved, range(3, 6))
    train(*live, range(3, 6))
    assert same_parameters(saved[0], live[0])


def test_every_optimizer_of_torch_is_tried():
    there = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    assert there - {"Optimizer", "SparseAdam"} <= {kind.split()[0] for kind in KINDS}


@pytest.mark.parametrize("kind", TESTED)
def test_empty_state_returns_to_an_optimizer_empty_or_not(kind):
    for trained in (0, 2):
        live = make(kind)
        train(*live, range(trained))
        carry(OptimizerState("o", make(kind)[1]), OptimizerState("o", live[1]))
        assert repr(live[1].state_dict()) == repr(make(kind)[1].state_dict())


def test_restore_changes_no_parameter_and_no_gradient():
    saved, live = make("Adam"), make("Adam")
    train(*saved, range(2))
    live[0].first.weight.grad = torch.full((4, 3), 7.0)
    before = [p.clone() for p in live[0].parameters()]
    carry(OptimizerState("o", saved[1]), OptimizerState("o", live[1]))
    assert all(torch.equal(a, b) for a, b in zip(before, live[0].parameters(), strict=True))
    assert (live[0].first.weight.grad == 7).all()
    assert live[0].second.weight.grad is None


def test_state_that_is_there_is_restored_in_place():
    saved, live = make("Adam"), make("Adam")
    train(*saved, range(3))
    train(*live, range(1))
    moment = live[1].state[live[0].first.weight]["exp_avg"]
    carry(OptimizerState("o", saved[1]), OptimizerState("o", live[1]))
    assert live[1].state[live[0].first.weight]["exp_avg"] is moment
    assert torch.equal(moment, saved[1].state[saved[0].first.weight]["exp_avg"])


def test_state_follows_parameters_not_their_names_or_the_saved_object():
    saved, live = make("Adam"), make("Adam")
    train(*saved, range(3))
    carry(OptimizerState("o", saved[1]), OptimizerState("o", live[1]))
    mine = {id(p) for p in live[0].parameters()}
    assert {id(p) for p in live[1].state} <= mine
    assert {id(p) for g in live[1].param_groups for p in g["params"]} == mine
    live[1].state[live[0].first.weight]["exp_avg"].zero_()
    assert saved[1].state[saved[0].first.weight]["exp_avg"].any()


def moments(optimizer, *modules):
    """Return what the average of each parameter is filled with."""
    params = [param for module in modules for param in module.parameters()]
    return [round(optimizer.state[p]["exp_avg"].flatten()[0].item(), 3) for p in params]


def stepped(optimizer, *modules):
    """Step with gradients of 1, 2, 3 and so on, parameter by parameter."""
    for number, param in enumerate(p for module in modules for p in module.parameters()):
        param.grad = torch.full_like(param, number + 1.0)
    optimizer.step()


def test_parameters_of_two_modules_of_which_one_is_known_are_not_mixed_up():
    saved, live = ([nn.Linear(2, 2), nn.Linear(2, 2)] for _ in range(2))
    optimizer = torch.optim.Adam([*saved[0].parameters(), *saved[1].parameters()])
    stepped(optimizer, *saved)
    other = torch.optim.Adam([*live[1].parameters(), *live[0].parameters()])
    carry(
        OptimizerState("o", optimizer, module=saved[0]),
        OptimizerState("o", other, module=live[0]),
    )
    assert moments(other, *live) == moments(optimizer, *saved) == [0.1, 0.2, 0.3, 0.4]


def test_names_that_contradict_the_order_are_a_mismatch():
    first, second = nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(2, 2)})
    optimizers = []
    for module in (first, second):
        unknown = nn.Parameter(torch.zeros(1))
        optimizers.append(torch.optim.Adam([*module.parameters(), unknown]))
    with pytest.raises(StateMismatchError, match=r"weight is saved, the program has a\.w"):
        carry(
            OptimizerState("o", optimizers[0], module=first),
            OptimizerState("o", optimizers[1], module=second),
        )


class TiedLayers(nn.Module):
    """Two names for one weight, in an order that the next run may change."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(2, 2, bias=False))
        self.embed.weight = self.head.weight


def test_state_of_a_tied_parameter_is_found_by_any_of_its_names():
    saved = TiedLayers("embed", "other", "head")
    live = TiedLayers("head", "other", "embed")
    optimizer, other = (torch.optim.Adam(m.parameters()) for m in (saved, live))
    stepped(optimizer, saved.embed, saved.other)
    carry(
        OptimizerState("o", optimizer, module=saved),
        OptimizerState("o", other, module=live),
    )
    assert moments(other, live.embed, live.other) == [0.1, 0.2]


def test_groups_keep_their_own_settings():
    def grouped(lr: float) -> torch.optim.Optimizer:
        net = Net()
        groups = [
            {"params": [net.first.weight], "lr": lr, "note": "first"},
            {"params": [net.second.weight, net.unused], "weight_decay": lr},
        ]
        return torch.optim.SGD(groups, lr=1.0, momentum=lr)

    live = grouped(0.5)
    members = [[id(p) for p in g["params"]] for g in live.param_groups]
    carry(OptimizerState("o", grouped(0.25)), OptimizerState("o", live))
    first, second = live.param_groups
    assert (first["lr"], first["momentum"], first["note"]) == (0.25, 0.25, "first")
    assert (second["lr"], second["weight_decay"]) == (1.0, 0.25)
    assert [[id(p) for p in g["params"]] for g in live.param_groups] == members


def test_tensor_rate_is_restored_in_place():
    saved, live = make("Adam tensor"), make("Adam tensor")
    rate = live[1].param_groups[0]["lr"]
    saved[1].param_groups[0]["lr"].fill_(0.7)
    carry(OptimizerState("o", saved[1]), OptimizerState("o", live[1]))
    assert live[1].param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.7)


class Master(torch.optim.Optimizer):
    """Keeps float32 moments of bfloat16 parameters, as mixed-precision ones do."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["master"] = p.detach().float()
                    state["history"] = [torch.zeros(2, dtype=torch.int64), None, "text"]
                state["master"] -= group["lr"] * 1e-4
                p.data.copy_(state["master"])


def test_wide_moments_of_narrow_parameters_stay_wide_and_exact():
    saved = Master([nn.Parameter(torch.ones(5, dtype=torch.bfloat16))])
    live = Master([nn.Parameter(torch.ones(5, dtype=torch.bfloat16))])
    for _ in range(3):
        saved.step()
    carry(OptimizerState("o", saved), OptimizerState("o", live))
    ours, theirs = (next(iter(o.state.values())) for o in (live, saved))
    assert ours["master"].dtype == torch.float32
    assert torch.equal(ours["master"], theirs["master"])
    assert ours["history"][1:] == [None, "text"]
    assert ours["history"][0].dtype == torch.int64


class Overrides(torch.optim.SGD):
    def load_state_dict(self, state_dict):
        self.loaded = state_dict
        super().load_state_dict(state_dict)


def test_loading_of_its_own_is_used_where_an_optimizer_has_it():
    saved, live = (Overrides(Net().parameters(), lr=lr, momentum=0.9) for lr in (0.5, 0.1))
    carry(OptimizerState("o", saved), OptimizerState("o", live))
    assert live.loaded["param_groups"][0]["lr"] == 0.5
    assert live.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("hook", ["pre", "post"])
def test_hooks_on_loading_are_called(hook):
    called = []
    saved, live = make("Adam"), make("Adam")
    train(*saved, range(2))
    register = getattr(live[1], f"register_load_state_dict_{hook}_hook")
    register(lambda *given: called.append(len(given)))
    restore(saved, live)
    assert called == [2 if hook == "pre" else 1]
    train(*saved, range(2, 4))
    train(*live, range(2, 4))
    assert same_parameters(saved[0], live[0])


def test_hooks_on_saving_are_seen():
    saved, live = make("SGD"), make("SGD")
    saved[1].register_state_dict_post_hook(lambda _, state: {**state, "more": [1]})
    assert OptimizerState("o", saved[1]).nested()["content"]["more"] == [1]
    carry(OptimizerState("o", saved[1]), OptimizerState("o", live[1]))


def test_parameters_of_other_number_or_shape_are_all_told_and_nothing_is_changed():
    def optimizer(*groups):
        return torch.optim.SGD(
            [{"params": [nn.Parameter(torch.ones(shape)) for shape in g]} for g in groups],
            lr=0.5,
        )

    live = optimizer([(2,), (3, 2)], [(1,)])
    live.param_groups[0]["lr"] = 0.125
    with pytest.raises(StateMismatchError) as caught:
        carry(
            OptimizerState("o", optimizer([(2,), (3, 3)], [(1,), (4,)], [(1,)])),
            OptimizerState("o", live),
        )
    assert len(caught.value.problems) == 3
    assert live.param_groups[0]["lr"] == 0.125


def test_contents_of_another_state_are_a_mismatch():
    for structure in (None, [], {}, {"params": 5}, {"content": {}}):
        with pytest.raises(StateMismatchError, match="not saved from an optimizer"):
            OptimizerState("o", make("SGD")[1]).prepare(structure, [], strict=True)


def test_empty_entries_count_as_none():
    saved, live = make("SGD"), make("SGD")
    train(*saved, range(1))  # torch notes an entry without contents
    captured = [OptimizerState("o", side[1]).capture().structure for side in (saved, live)]
    assert captured[0] == captured[1]


def test_new_state_is_made_where_torch_would_put_it():
    saved, live = make("Adam"), make("Adam")
    train(*saved, range(1))
    state = OptimizerState("o", live[1])
    captured = OptimizerState("o", saved[1]).capture()
    devices = {leaf.spec.name: state.device_of(leaf.spec.name) for leaf in captured.leaves}
    assert {str(device) for device in devices.values()} == {"cpu"}
    meta = torch.optim.Adam([nn.Parameter(torch.empty(2, device="meta"))])
    elsewhere = OptimizerState("o", meta)
    assert str(elsewhere.device_of("content/state/0/exp_avg")) == "meta"
    assert str(elsewhere.device_of("content/state/0/step")) == "cpu"
    assert str(elsewhere.device_of("content/state/7/exp_avg")) == "cpu"
    assert str(elsewhere.device_of("content/param_groups/0/lr")) == "cpu"
    meta.param_groups[0]["capturable"] = True
    assert str(elsewhere.device_of("content/state/0/step")) == "meta"
