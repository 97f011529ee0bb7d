# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from mpi_ckpt import OptimizerState, TrainState
from mpi_ckpt.errors import RegistrationError, StageError, StateMismatchError
from mpi_ckpt.leaves.leaf import Gate, LeafSpec
from mpi_ckpt.states.rebuilding import nodes_of, rebuild
from tests.states.fake_mesh import being_rank, fill, join, numbers

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch to itself
    from torch.distributed.optim import ZeroRedundancyOptimizer

SIZES = (7, 5, 3, 1)
KINDS = [
    torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad,
    torch.optim.NAdam, torch.optim.ASGD, torch.optim.Adafactor,
]  # fmt: skip


def make_module() -> torch.nn.ParameterDict:
    return torch.nn.ParameterDict(
        {f"p{size}": torch.nn.Parameter(numbers(size, 2)) for size in SIZES}
    )


def make_zero(module: torch.nn.Module, kind=torch.optim.Adam, **options):
    return ZeroRedundancyOptimizer(module.parameters(), kind, **options)


def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for parameter in module.parameters():
        parameter.grad = (numbers(*parameter.shape) + 1) * number
    optimizer.step()


def plain(steps: int, kind=torch.optim.Adam, **options) -> tuple:
    """Return a module and an ordinary optimizer after some steps."""
    module = make_module()
    optimizer = kind(module.parameters(), **options)
    for number in range(1, steps + 1):
        step(module, optimizer, number)
    return module, optimizer


def moments(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> dict:
    """Return the state of the parameters that an optimizer has, by their names."""
    state = getattr(optimizer, "optim", optimizer).state
    return {
        (name, key): value.clone()
        for name, parameter in module.named_parameters()
        for key, value in state.get(parameter, {}).items()
    }


def saved_by(size: int, kind=torch.optim.Adam, **options) -> tuple:
    """Return structure, specs and whole leaves of a training of several ranks."""
    captures = []
    for rank in range(size):
        with being_rank(rank, size):
            module = make_module()
            optimizer = make_zero(module, kind, **options)
            step(module, optimizer, 1)
            captures.append(OptimizerState("o", optimizer, module=module).capture())
    assert len({str(captured.structure) for captured in captures}) == 1
    owners: dict[str, list] = {}
    for rank, captured in enumerate(captures):
        for leaf in captured.leaves:
            if leaf.tiles is not None:
                owners.setdefault(leaf.spec.name, []).append((rank, leaf))
    assert all(len(those) == 1 for those in owners.values())
    assert len({rank for ((rank, _),) in owners.values()}) == min(size, len(SIZES))
    specs = {leaf.spec.name: leaf.spec for one in captures for leaf in one.leaves}
    return captures[0].structure, [specs[name] for name in sorted(specs)], join(captures)


def restore(state, saved: tuple) -> None:
    structure, specs, wholes = saved
    arrival = state.prepare(structure, specs, strict=True)
    assert arrival.unexpected == arrival.missing == ()
    fill(arrival, [spec.name for spec in specs], wholes)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_save_what_one_optimizer_has(kind):
    module, optimizer = plain(1, kind)
    structure, specs, wholes = saved_by(3, kind)
    whole = OptimizerState("o", optimizer, module=module).capture()
    assert {leaf.spec for leaf in whole.leaves} == set(specs)
    expected = join([whole])
    assert all((wholes[name] == expected[name]).all() for name in expected)
    assert structure["class"] == whole.structure["class"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1], ids=["new", "stepped"])
def test_another_number_of_ranks_goes_on_with_it(kind, steps):
    saved = saved_by(3, kind)
    module, optimizer = plain(1, kind)
    expected = moments(optimizer, module)
    step(module, optimizer, 2)
    later = moments(optimizer, module)
    found, after = {}, {}
    for rank in range(2):
        with being_rank(rank, 2):
            ours, _ = plain(1, kind)
            other = make_zero(ours, kind)
            if steps:
                step(make_module(), other, 1)
                step(ours, other, 5)
                with torch.no_grad():
                    for parameter, now in zip(
                        ours.parameters(), plain(1, kind)[0].parameters(), strict=True
                    ):
                        parameter.copy_(now)
            restore(OptimizerState("o", other, module=ours), saved)
            found |= moments(other, ours)
            step(ours, other, 2)
            after |= moments(other, ours)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)
    assert all(after[key].equal(later[key]) for key in later)


def test_an_ordinary_optimizer_goes_on_with_it_and_the_other_way_round():
    expected = moments(*plain(1)[::-1])
    module, optimizer = plain(0)
    restore(OptimizerState("o", optimizer, module=module), saved_by(3))
    found = moments(optimizer, module)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)

    source, stepped = plain(1)
    whole = OptimizerState("o", stepped, module=source).capture()
    specs = [leaf.spec for leaf in whole.leaves]
    dealt = {}
    for rank in range(3):
        with being_rank(rank, 3):
            ours = make_module()
            other = make_zero(ours)
            state = OptimizerState("o", other, module=ours)
            restore(state, (whole.structure, specs, join([whole])))
            mine = moments(other, ours)
            assert not dealt.keys() & mine.keys()
            dealt |= mine
    assert dealt.keys() == expected.keys()
    assert all(dealt[key].equal(expected[key]) for key in expected)


def test_a_training_is_restored_in_place_with_its_rates():
    with being_rank(1, 2):
        module = make_module()
        optimizer = make_zero(module, lr=0.25)
        step(module, optimizer, 1)
        state = TrainState(module=module, optimizer=optimizer, overlap=True)
        captured = state.capture()
        owned = [leaf for leaf in captured.leaves if leaf.tiles is not None]
        assert owned
        assert all(isinstance(leaf.gate, Gate) for leaf in owned)
        specs = [leaf.spec for leaf in captured.leaves]
        wholes = {spec.name: np.ones(spec.shape, "f4") for spec in specs}
        before = {
            id(value)
            for entry in optimizer.optim.state.values()
            for value in entry.values()
        }
        optimizer.param_groups[0]["lr"] = 0.5
        arrival = state.prepare(captured.structure, specs, strict=True)
        fill(arrival, [spec.name for spec in specs], wholes)
        after = [v for entry in optimizer.optim.state.values() for v in entry.values()]
        assert {id(value) for value in after} == before
        assert all((value == 1).all() for value in after)
        assert optimizer.param_groups[0]["lr"] == 0.25
        assert optimizer.optim.param_groups[0]["lr"] == 0.25
        assert len(optimizer.optim.param_groups[0]["params"]) < len(SIZES)


def test_a_rate_that_is_a_tensor_is_a_whole_leaf():
    saved = saved_by(2, lr=torch.tensor(0.25))
    (rate,) = [spec for spec in saved[1] if not spec.name.startswith("content/state/")]
    assert rate == LeafSpec("content/param_groups/0/lr", "F32", ())
    with being_rank(0, 1):
        module = make_module()
        optimizer = make_zero(module, lr=torch.tensor(0.5))
        state = OptimizerState("o", optimizer, module=module)
        restore(state, saved)
        assert float(optimizer.optim.param_groups[0]["lr"]) == 0.25
        arrival = state.prepare(saved[0], saved[1], strict=True)
        moved = [arrival.elsewhere(index) for index in range(len(saved[1]))]
        assert [leaf is not None for leaf in moved] == [spec == rate for spec in saved[1]]


def test_parameters_are_matched_by_name():
    saved = saved_by(2)
    with being_rank(0, 1):
        module = torch.nn.ParameterDict(reversed(list(make_module().items())))
        optimizer = make_zero(module)
        restore(OptimizerState("o", optimizer, module=module), saved)
        found = moments(optimizer, module)
    source, stepped = plain(1)
    expected = moments(stepped, source)
    assert all(found[key].equal(expected[key]) for key in expected)


def test_another_class_or_shape_is_a_mismatch():
    structure, specs, _ = saved_by(2)
    with being_rank(0, 1):
        module = make_module()
        state = OptimizerState("o", make_zero(module, torch.optim.AdamW), module=module)
        with pytest.raises(StateMismatchError, match=r"from the optimizer Adam, .* AdamW"):
            state.prepare(structure, specs, strict=True)
        module["p7"] = torch.nn.Parameter(numbers(9, 2))
        state = OptimizerState("o", make_zero(module), module=module)
        with pytest.raises(StateMismatchError, match=r"p7 is saved with shape \[7, 2\]"):
            state.prepare(structure, specs, strict=True)
        for broken in ({**structure, "content": 5}, {**structure, "params": None}):
            with pytest.raises(StateMismatchError, match="not saved from an optimizer"):
                state.prepare(broken, specs, strict=True)


class Counting(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["calls"] = 1


def test_what_only_its_owner_knows_is_refused_by_name():
    with being_rank(0, 2):
        module = make_module()
        optimizer = make_zero(module, Counting, lr=0.1)
        step(module, optimizer, 1)
        with pytest.raises(StageError, match=r"state 'calls' of parameter 0 .* is a int"):
            OptimizerState("o", optimizer).capture()


def test_an_optimizer_that_steps_within_the_backward_pass_is_refused():
    with being_rank(0, 2):
        optimizer = make_zero(make_module(), overlap_with_ddp=True)
        with pytest.raises(RegistrationError, match="overlap_with_ddp=True"):
            OptimizerState("o", optimizer)


def test_loading_without_a_job_gives_the_state_dict_of_an_ordinary_optimizer():
    structure, specs, wholes = saved_by(2)
    nodes = nodes_of(structure, {spec.name: None for spec in specs})
    assert {node["~"] for node in nodes.values()} == {"tensor"}
    found = rebuild(structure, {name: torch.tensor(v) for name, v in wholes.items()})
    module, optimizer = plain(0)
    optimizer.load_state_dict(found)
    source, stepped = plain(1)
    expected = moments(stepped, source)
    assert all(moments(optimizer, module)[k].equal(expected[k]) for k in expected)
    other = {"owned": 1, "content": 2}
    assert rebuild(other, {}) == other
