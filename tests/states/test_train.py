# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from mpi_ckpt.errors import RegistrationError, StateMismatchError
from mpi_ckpt.states.train import TrainState
from tests.making import carry


class Training:
    """A small training with everything in it."""

    def __init__(self, seed: int, width: int = 4) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(
            nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1)
        )
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)

    def state(self, *left_out: str) -> TrainState:
        parts = {key: value for key, value in vars(self).items() if key not in left_out}
        return TrainState(**parts)

    def run(self, steps: range) -> list[bytes]:
        seen = []
        for step in steps:
            self.optimizer.zero_grad()
            batch = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
            loss = self.module(batch).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            rate, scale = self.optimizer.param_groups[0]["lr"], self.scaler.get_scale()
            seen.append((loss.item(), rate, scale))
        return seen


@pytest.mark.parametrize("trained_before", [0, 1, 5])
def test_training_goes_on_bit_for_bit(trained_before):
    saved, live = Training(1), Training(2)
    saved.run(range(3))
    live.run(range(50, 50 + trained_before))
    carry(saved.state(), live.state())
    assert live.run(range(3, 8)) == saved.run(range(3, 8))


@pytest.mark.parametrize(
    "left_out",
    [(), ("scaler",), ("scheduler", "scaler"), ("optimizer", "scheduler", "scaler")],
)
def test_parts_that_are_not_given_are_not_saved(left_out):
    state = Training(1).state(*left_out)
    structure = state.capture().structure
    assert set(structure) == {"module", "optimizer", "scheduler", "scaler"} - set(left_out)
    live = Training(2)
    carry(Training(1).state(*left_out), live.state(*left_out))
    assert torch.equal(live.module[0].weight, Training(1).module[0].weight)


def test_leaves_are_named_after_their_part():
    training = Training(1)
    training.run(range(1))
    names = [leaf.spec.name for leaf in training.state().capture().leaves]
    assert "module/0.weight" in names
    assert "optimizer/content/state/0/exp_avg" in names
    assert len(set(names)) == len(names)


def test_missing_and_unexpected_parts_are_told_at_once():
    saved, live = Training(1), Training(2)
    before = live.module[0].weight.clone()
    with pytest.raises(StateMismatchError) as caught:
        carry(saved.state("scheduler"), live.state("optimizer"))
    assert caught.value.problems == (
        "train: optimizer is saved, the program has none",
        "train: scheduler is in the program, not saved",
    )
    assert torch.equal(live.module[0].weight, before)


def test_mismatches_of_all_parts_are_told_at_once_and_nothing_is_changed():
    live = Training(2, width=5)
    before = {name: tensor.clone() for name, tensor in live.module.state_dict().items()}
    with pytest.raises(StateMismatchError) as caught:
        carry(Training(1).state(), live.state())
    problems = "\n".join(caught.value.problems)
    assert "module: 0.weight" in problems
    assert "optimizer: group 0, parameter 0.weight is saved with shape [4, 3]" in problems
    for name, tensor in live.module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("structure", [None, 5, [], "x", {}])
def test_contents_of_another_state_are_a_mismatch(structure):
    with pytest.raises(StateMismatchError, match="not saved"):
        Training(1).state().prepare(structure, [], strict=True)


def test_name_and_mode_are_checked():
    module = nn.Linear(1, 1)
    assert TrainState(module=module).name == "train"
    assert TrainState(module=module, name="other", sync="check").sync_mode == "check"
    with pytest.raises(RegistrationError, match="sync is 'all'"):
        TrainState(module=module, sync="all")
    with pytest.raises(RegistrationError, match="must not be a path"):
        TrainState(module=module, name="../x")
