# SPDX-License-Identifier: Apache-2.0
"""Ranks that have different parameters, as stages of a pipeline do."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from mpi_ckpt import ModuleState, OptimizerState, TrainState
from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.states.rebuilding import nodes_of, rebuild
from tests.states.fake_mesh import each_rank, fill, join, numbers

STAGES = (("0", "1"), ("2", "3"))
SIZES = {"0": 3, "1": 5, "2": 3, "3": 3}


def layers(names) -> nn.ModuleDict:
    net = nn.ModuleDict({name: nn.Linear(2, SIZES[name]) for name in names})
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(numbers(*parameter.shape) + int(name[0]))
    return net


def adam(net, **options):
    return torch.optim.Adam([{"params": net.parameters()}], lr=0.5, **options)


def step(net, optimizer):
    for parameter in net.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()


def plain(names=SIZES):
    net = layers(names)
    optimizer = adam(net)
    step(net, optimizer)
    return net, optimizer


def stages(make=adam, steps=1):
    """Be each rank in turn; yield its part of the network, its optimizer and a state."""
    for rank, mesh in each_rank(2, 2):
        net = layers(STAGES[rank // 2])
        for layer in net.values():
            fully_shard(layer, mesh=mesh["tp"])
        optimizer = make(net)
        if steps:
            step(net, optimizer)
        state = TrainState(module=net, optimizer=optimizer)
        state.bind(SimpleNamespace(size=4))
        yield net, optimizer, state


def saved():
    """Return structure, specs and whole leaves that the stages together save."""
    captures = [state.capture() for _, _, state in stages()]
    assert len({str(captured.structure) for captured in captures}) == 1
    assert all(leaf.tiles is not None for one in captures for leaf in one.leaves)
    specs = {leaf.spec.name: leaf.spec for one in captures for leaf in one.leaves}
    cut = [LeafSpec(name, s.dtype, s.shape, is_cut=True) for name, s in specs.items()]
    return captures[0].structure, cut, join(captures)


def moments(net, optimizer) -> dict:
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {
        (names[parameter], key): value
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }


def restore(state, contents):
    structure, specs, wholes = contents
    arrival = state.prepare(structure, specs, strict=True)
    assert arrival.missing == arrival.unexpected == ()
    fill(arrival, [spec.name for spec in specs], wholes)
    return arrival


def test_stages_together_save_what_one_process_has():
    _, specs, wholes = saved()
    net, optimizer = plain()
    expected = {f"module/{name}": tensor for name, tensor in net.state_dict().items()}
    for (name, key), value in moments(net, optimizer).items():
        expected[f"optimizer/content/state/0/{name}/{key}"] = value
    assert {spec.name for spec in specs} == wholes.keys() == expected.keys()
    assert all((wholes[name] == expected[name].detach().numpy()).all() for name in expected)


def test_one_process_restores_what_stages_have_saved():
    net = layers(reversed(SIZES))
    optimizer = adam(net)
    restore(TrainState(module=net, optimizer=optimizer), saved())
    expected, found = moments(*plain()), moments(net, optimizer)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert optimizer.param_groups[0]["params"] == list(net.parameters())


@pytest.mark.parametrize("steps", [0, 1], ids=["new", "stepped"])
def test_each_stage_restores_its_own(steps):
    contents = saved()
    again = []
    for net, optimizer, state in stages(steps=steps):
        with torch.no_grad():
            for value in moments(net, optimizer).values():
                value.zero_()
        arrival = restore(state, contents)
        assert None in arrival.leaves
        assert any(arrival.elsewhere(index) for index in range(len(arrival.leaves)))
        again.append(state.capture())
    assert {one: (a == contents[2][one]).all() for one, a in join(again).items()} == (
        dict.fromkeys(contents[2], True)
    )


def test_stages_restore_what_a_sharded_network_has_saved():
    captures = []
    for _, mesh in each_rank(3, 1):
        net = layers(SIZES)
        for layer in net.values():
            fully_shard(layer, mesh=mesh["dp"])
        optimizer = adam(net)
        step(net, optimizer)
        captures.append(TrainState(module=net, optimizer=optimizer).capture())
    specs = [
        LeafSpec(leaf.spec.name, leaf.spec.dtype, leaf.spec.shape, leaf.tiles is not None)
        for leaf in captures[0].leaves
    ]
    contents = captures[0].structure, specs, join(captures)
    again = []
    for _, _, state in stages(steps=0):
        restore(state, contents)
        again.append(state.capture())
    expected, found = saved()[2], join(again)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)


def test_loading_without_a_job_gives_the_state_dict_of_one_optimizer():
    structure, specs, wholes = saved()
    values = {name: torch.tensor(whole) for name, whole in wholes.items()}
    assert nodes_of(structure, values).keys() == {spec.name for spec in specs}
    found = rebuild(structure, values)
    assert found["module"].keys() == plain()[0].state_dict().keys()
    net = layers(SIZES)
    by_name = dict(net.named_parameters())
    optimizer = torch.optim.Adam([by_name[name] for name in found["module"]])
    optimizer.load_state_dict(found["optimizer"])
    expected, loaded = moments(*plain()), moments(net, optimizer)
    assert loaded.keys() == expected.keys()
    assert all(loaded[name].equal(expected[name]) for name in expected)


def test_stages_restore_what_one_process_has_saved():
    net, optimizer = plain()
    captured = TrainState(module=net, optimizer=optimizer).capture()
    specs = [leaf.spec for leaf in captured.leaves]
    wholes = {one.spec.name: whole_of(one) for one in captured.leaves}
    again = []
    for _, _, state in stages(steps=0):
        restore(state, (captured.structure, specs, wholes))
        again.append(state.capture())
    expected, found = saved()[2], join(again)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)


def whole_of(leaf):
    return np.frombuffer(leaf.buffer.read(), np.float32).reshape(leaf.spec.shape)


def test_a_program_of_one_process_must_have_all_that_was_saved():
    net, optimizer = plain()
    captured = TrainState(module=net, optimizer=optimizer).capture()
    specs = [leaf.spec for leaf in captured.leaves]
    state = ModuleState("m", layers(["0"]))
    of_module = [spec for spec in specs if spec.name.startswith("module/")]
    own = [LeafSpec(one.name[7:], one.dtype, one.shape) for one in of_module]
    with pytest.raises(StateMismatchError, match="the program has no such parameter"):
        state.prepare(captured.structure["module"], own, strict=True)


def test_tied_names_of_another_stage_are_no_mismatch():
    structure = {"ties": {"9.weight": "0.weight"}, "extra": {}}
    specs = [LeafSpec("1.weight", "F32", (5, 2)), LeafSpec("0.weight", "F32", (3, 2), True)]
    state = ModuleState("m", nn.ModuleDict({"1": nn.Linear(2, 5, bias=False)}))
    arrival = state.prepare(structure, specs, strict=True)
    assert [leaf is None for leaf in arrival.leaves] == [False, True]


def test_parameters_need_names_where_ranks_have_different_ones():
    structure, specs, _ = saved_alone()
    for net, optimizer, _ in stages():
        state = OptimizerState("o", optimizer)
        state.bind(SimpleNamespace(size=4))
        with pytest.raises(StageError, match=r"give the optimizer model.named_parameters"):
            state.capture()
        with pytest.raises(StateMismatchError, match="take a TrainState"):
            state.prepare(structure, specs, strict=True)
        named = OptimizerState("o", torch.optim.Adam(net.named_parameters(), lr=0.5))
        named.bind(SimpleNamespace(size=4))
        arrival = named.prepare(structure, specs, strict=True)
        taken = sum(leaf is not None for leaf in arrival.leaves)
        assert taken == 3 * len(list(net.parameters()))


def saved_alone():
    structure, specs, wholes = saved()
    start = "optimizer/"
    own = [
        LeafSpec(spec.name.removeprefix(start), spec.dtype, spec.shape, is_cut=True)
        for spec in specs
        if spec.name.startswith(start)
    ]
    return structure["optimizer"], own, wholes


def test_other_parameters_and_groups_are_a_mismatch():
    structure, specs, _ = saved_alone()
    net = layers(["0", "1", "2"])
    state = OptimizerState("o", adam(net), module=net)
    with pytest.raises(StateMismatchError, match=r"3.weight is saved, the program has no"):
        state.prepare(structure, specs, strict=True)
    net = layers(SIZES)
    halves = [{"params": part.parameters()} for part in (net["0"], net["1"])]
    state = OptimizerState("o", torch.optim.Adam(halves), module=net)
    with pytest.raises(StateMismatchError, match=r"1 parameter groups are saved, .* has 2"):
        state.prepare(structure, specs, strict=True)


def test_a_structure_of_another_form_is_a_mismatch():
    structure, specs, wholes = saved_alone()
    far = LeafSpec("content/state/7/0.weight/exp_avg", "F32", (3, 2))
    net = layers(SIZES)
    state = OptimizerState("o", adam(net), module=net)
    for groups, leaves in ((5, specs), ([6], specs), (None, [*specs, far])):
        content = structure["content"]
        if groups is not None:
            content = {**content, "param_groups": groups}
        spoilt = {**structure, "content": content}
        assert (
            rebuild(spoilt, dict.fromkeys((one.name for one in leaves), wholes)) is not None
        )
        with pytest.raises(StateMismatchError):
            state.prepare(spoilt, leaves, strict=True)


class Counting(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["calls"] = 1


def test_state_that_is_no_tensor_is_refused_by_name():
    for _, _, state in stages(lambda net: Counting(net.parameters(), lr=0.1)):
        with pytest.raises(StageError, match=r"/[02].weight: the state 'calls' is a int"):
            state.capture()
