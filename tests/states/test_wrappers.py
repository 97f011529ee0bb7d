# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from mpi_ckpt import ModuleState, TrainState  # noqa: E402
from mpi_ckpt.errors import RegistrationError, StageError  # noqa: E402
from mpi_ckpt.states import wrappers  # noqa: E402
from mpi_ckpt.states.tensors import tensor_spec  # noqa: E402


def names(state):
    return [leaf.spec.name for leaf in state.capture().leaves]


def test_replicas_in_one_process_are_saved_under_the_names_of_the_module():
    module = torch.nn.Linear(2, 3)
    wrapped = torch.nn.DataParallel(module)
    assert names(ModuleState("m", wrapped)) == names(ModuleState("m", module))
    assert names(TrainState(module=wrapped)) == ["module/weight", "module/bias"]


def test_what_was_saved_wrapped_is_restored_without():
    module, bare = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    stream = io.BytesIO()
    ModuleState("m", torch.nn.DataParallel(module)).save(stream)
    stream.seek(0)
    ModuleState("m", bare).load(stream)
    assert torch.equal(bare.weight, module.weight)


def test_wrappers_are_seen_through_one_after_the_other(monkeypatch):
    class OptimizedModule(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

    home = SimpleNamespace(OptimizedModule=OptimizedModule)
    monkeypatch.setitem(wrappers.sys.modules, "torch._dynamo.eval_frame", home)
    module = torch.nn.Linear(2, 3)
    around = OptimizedModule(torch.nn.DataParallel(module))
    assert wrappers.unwrapped("m", around) is module


def test_a_module_of_the_users_with_such_names_is_left_alone():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Linear(2, 3)

    assert names(ModuleState("m", Mine())) == ["module.weight", "module.bias"]


def test_sharded_module_is_refused_wherever_it_stands(monkeypatch):
    home, kind = wrappers._FSDP
    stand_in = SimpleNamespace(**{kind: torch.nn.Bilinear})
    monkeypatch.setitem(wrappers.sys.modules, home, stand_in)
    module = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Bilinear(1, 1, 1))
    with pytest.raises(
        RegistrationError, match=r"'m'.*sharded by FullyShardedDataParallel"
    ):
        ModuleState("m", module)


def test_sharded_tensor_is_refused(monkeypatch):
    class ShardedTensor(torch.Tensor):
        pass

    home = SimpleNamespace(ShardedTensor=ShardedTensor)
    name = "torch.distributed._shard.sharded_tensor"
    monkeypatch.setitem(wrappers.sys.modules, name, home)
    with pytest.raises(StageError, match="'x' is a ShardedTensor, of which each rank has"):
        tensor_spec("x", torch.zeros(2).as_subclass(ShardedTensor))
