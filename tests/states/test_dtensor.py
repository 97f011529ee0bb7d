# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from mpi_ckpt import ModuleState, ObjectState, OptimizerState, PerRankState, TrainState
from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.leaves.leaf import Gate, LeafSpec
from mpi_ckpt.states.dtensor import local_tensor
from mpi_ckpt.states.leaf_values import takes_bytes
from mpi_ckpt.states.tensors import tensor_leaf
from tests.states.fake_mesh import (
    being_rank,
    each_rank,
    fill,
    join,
    numbers,
    slices,
    tile_values,
)

# At every edit a mesh of each kind: one rank, one dimension, even and uneven ones.
QUICK = [(1, 1), (4, 1), (2, 2), (3, 2)]
MESHES = [
    pytest.param((a, b), marks=[] if (a, b) in QUICK else pytest.mark.full)
    for a in range(1, 5)
    for b in range(1, 5)
]
PLACEMENTS = [
    (Shard(0), Replicate()),
    (Replicate(), Shard(0)),
    (Shard(0), Shard(0)),
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Replicate(), Replicate()),
]


def split(whole: torch.Tensor, mesh: DeviceMesh, placements) -> DTensor:
    # Each rank has the whole, and torch takes its part of it: nothing is sent.
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def look(leaf, whole: torch.Tensor, counts: np.ndarray) -> None:
    """Require of each tile that its elements are those of its box; count them."""
    assert leaf.spec == LeafSpec("x", "F32", tuple(whole.shape))
    for box, values in tile_values(leaf):
        assert (values == whole.numpy()[slices(box)]).all()
        counts[slices(box)] += 1


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_boxes_are_what_torch_distributes(shape):
    counts = {}
    for _, mesh in each_rank(*shape):
        for length in range(25):
            whole = numbers(length, 3)
            for number, placements in enumerate(PLACEMENTS):
                leaf = tensor_leaf("x", split(whole, mesh, placements))
                key = length, number
                look(leaf, whole, counts.setdefault(key, np.zeros(whole.shape, int)))
    for (_, number), count in counts.items():
        copies = np.prod(
            [n for n, p in zip(shape, PLACEMENTS[number], strict=True) if p == Replicate()]
        )
        assert (count == copies).all()


def leaf_or_none(given: DTensor):
    with suppress(StageError):
        return tensor_leaf("x", given)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_boxes_of_strided_parts_are_what_torch_distributes_or_refused(shape):
    kinds = [
        (_StridedShard(0, split_factor=shape[1]), Shard(0)),
        (_StridedShard(0, split_factor=3), Replicate()),
        (Replicate(), _StridedShard(0, split_factor=2)),
    ]
    found = defaultdict(list)
    for _, mesh in each_rank(*shape):
        for length, kind in product(range(25), range(len(kinds))):
            given = split(numbers(length, 2), mesh, kinds[kind])
            found[length, kind].append(leaf_or_none(given))
    for (length, kind), leaves in found.items():
        if None in leaves:
            # Of uneven parts torch makes other ones here than FSDP2 does. Some rank has a
            # part of another shape, and so no rank saves anything.
            assert kind == 0
            assert length % (shape[0] * shape[1])
            continue
        whole = numbers(length, 2)
        count = np.zeros(whole.shape, int)
        for leaf in leaves:
            look(leaf, whole, count)
        assert (count == (1, shape[1], shape[0])[kind]).all()


def sharded_linear(mesh: DeviceMesh, rows: int, style=ColwiseParallel) -> torch.nn.Linear:
    """Make a linear layer of known weights, tensor-parallel and sharded by FSDP2."""
    linear = torch.nn.Linear(4, rows)
    with torch.no_grad():
        linear.weight.copy_(numbers(rows, 4))
        linear.bias.copy_(100 + numbers(rows))
    if "tp" in mesh.mesh_dim_names:
        parallelize_module(linear, mesh["tp"], style(), src_data_rank=None)
    names = [name for name in mesh.mesh_dim_names if name != "tp"]
    fully_shard(linear, mesh=mesh[tuple(names)])
    return linear


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_fsdp_over_tensor_parallelism_is_saved_as_it_lies(shape):
    for rows in (1, 2, 3, 5, 8, 13, 24):
        captures = []
        for _, mesh in each_rank(*shape):
            captures.append(ModuleState("m", sharded_linear(mesh, rows)).capture())
        wholes = join(captures)
        assert (wholes["weight"] == numbers(rows, 4).numpy()).all()
        assert (wholes["bias"] == 100 + numbers(rows).numpy()).all()


def test_thirteen_rows_on_three_times_two_ranks():
    boxes = []
    for _, mesh in each_rank(3, 2):
        (weight, _) = ModuleState("m", sharded_linear(mesh, 13)).capture().leaves
        boxes += [str(tile.box) for tile in weight.tiles]
    rows = ["0:3", "7:9", "3:6", "9:11", "6:7", "11:13"]
    assert boxes == [f"[{run}, 0:4]" for run in rows]


def test_a_save_after_the_forward_pass_finds_the_sharded_parameters():
    for _, mesh in each_rank(2, names=["dp"]):
        net = sharded_linear(mesh, 13)
        net.set_reshard_after_forward(False)
        with torch.no_grad():
            net(torch.ones(2, 4))
        assert not isinstance(net.weight, DTensor)
        captured = ModuleState("m", net).capture()
        assert [leaf.tiles is not None for leaf in captured.leaves] == [True, True]


def test_hybrid_sharding_and_rows_cut_the_other_way():
    captures = []
    for _, mesh in each_rank(2, 2, 2, names=("copies", "dp", "tp")):
        captures.append(
            ModuleState("m", sharded_linear(mesh, 5, RowwiseParallel)).capture()
        )
    assert (join(captures)["weight"] == numbers(5, 4).numpy()).all()
    first = [str(tile.box) for tile in captures[0].leaves[0].tiles]
    again = [str(tile.box) for tile in captures[4].leaves[0].tiles]
    assert first == again == ["[0:3, 0:2]"]


def stepped(module: torch.nn.Module, make) -> torch.optim.Optimizer:
    """Make an optimizer, and let it take a step for gradients equal to the weights."""
    optimizer = make(module.parameters())
    for parameter in module.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.5)


OTHERS = {"wider": (2, 3), "flat": (5, 1), "alike": (3, 2)}


@pytest.mark.parametrize("steps", [0, 1], ids=["new", "stepped"])
@pytest.mark.parametrize("other", OTHERS)
def test_module_and_optimizer_return_on_another_mesh(other, steps):
    captures = []
    for _, mesh in each_rank(3, 2):
        module = sharded_linear(mesh, 13)
        state = TrainState(module=module, optimizer=stepped(module, adam))
        captures.append(state.capture())
    assert len({str(captured.structure) for captured in captures}) == 1
    wholes, specs = join(captures), [leaf.spec for leaf in captures[0].leaves]
    restored = []
    for _, mesh in each_rank(*OTHERS[other]):
        module = sharded_linear(mesh, 13)
        with torch.no_grad():
            module.weight.zero_()
        optimizer = stepped(module, adam) if steps else adam(module.parameters())
        state = TrainState(module=module, optimizer=optimizer)
        arrival = state.prepare(captures[0].structure, specs, strict=True)
        fill(arrival, [spec.name for spec in specs], wholes)
        for parameter in module.parameters():
            moment = optimizer.state[parameter]["exp_avg"]
            assert isinstance(moment, DTensor)
            assert moment.placements == parameter.placements
            assert not isinstance(optimizer.state[parameter]["step"], DTensor)
            parameter.grad = torch.zeros_like(parameter)
        restored.append(state.capture())
    again = join(restored)
    assert again.keys() == wholes.keys()
    assert all((again[name] == wholes[name]).all() for name in wholes)


def test_a_whole_module_returns_cut_and_the_other_way_round():
    plain = torch.nn.Linear(4, 13)
    saved = TrainState(module=plain, optimizer=stepped(plain, adam)).capture()
    wholes, specs = join([saved]), [leaf.spec for leaf in saved.leaves]
    names = [spec.name for spec in specs]
    captures = []
    for _, mesh in each_rank(3, 2):
        module = sharded_linear(mesh, 13)
        state = TrainState(module=module, optimizer=adam(module.parameters()))
        fill(state.prepare(saved.structure, specs, strict=True), names, wholes)
        captures.append(state.capture())
    cut = join(captures)
    assert all((cut[name] == wholes[name]).all() for name in names)
    other = torch.nn.Linear(4, 13)
    back = TrainState(module=other, optimizer=adam(other.parameters()))
    fill(back.prepare(captures[0].structure, specs, strict=True), names, cut)
    assert other.weight.equal(plain.weight)


def test_state_of_another_shape_than_its_parameter_is_made_on_each_rank():
    plain = torch.nn.Linear(4, 13)
    saved = OptimizerState("o", stepped(plain, torch.optim.Adafactor)).capture()
    specs = [leaf.spec for leaf in saved.leaves]
    for _, mesh in each_rank(3, 2):
        module = sharded_linear(mesh, 13)
        optimizer = torch.optim.Adafactor(module.parameters())
        state = OptimizerState("o", optimizer)
        arrival = state.prepare(saved.structure, specs, strict=True)
        fill(arrival, [spec.name for spec in specs], join([saved]))
        rows = optimizer.state[module.weight]["row_var"]
        assert rows.placements == (Replicate(), Replicate())
        assert (rows.to_local().numpy() == join([saved])["content/state/0/row_var"]).all()


def whole_state(state: dict) -> dict:
    """Return an optimizer's state dict with the local tensors of a mesh of one rank."""
    entries = {
        index: {key: local_tensor(value).clone() for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def test_an_optimizer_steps_with_what_was_restored():
    for _, mesh in each_rank(1, 1):
        plain, module = torch.nn.Linear(4, 13), sharded_linear(mesh, 13)
        saved = TrainState(module=plain, optimizer=stepped(plain, adam)).capture()
        names = [leaf.spec.name for leaf in saved.leaves]
        specs = [leaf.spec for leaf in saved.leaves]
        sharded = adam(module.parameters())
        state = TrainState(module=module, optimizer=sharded)
        fill(state.prepare(saved.structure, specs, strict=True), names, join([saved]))
        optimizer = adam(plain.parameters())
        optimizer.load_state_dict(whole_state(sharded.state_dict()))
        for parameter, other in zip(module.parameters(), plain.parameters(), strict=True):
            other.grad = torch.ones_like(other)
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        sharded.step()
        assert module.weight.to_local().equal(plain.weight)


def test_a_rank_outside_the_mesh_has_the_leaf_without_tiles():
    for rank in range(3):
        with being_rank(rank, 3):
            mesh = DeviceMesh("cpu", [0, 1])
            leaf = tensor_leaf("x", split(numbers(5), mesh, [Shard(0)]))
            assert leaf.spec == LeafSpec("x", "F32", (5,))
            boxes = [str(tile.box) for tile in leaf.tiles]
            assert boxes == [["[0:3]"], ["[3:5]"], []][rank]


class Odd(Placement):
    pass


def refused(make, message: str) -> None:
    with being_rank(0, 4):
        mesh = dist.init_device_mesh("cpu", (2, 2))
        state = ObjectState("o", {"part": make(mesh)})
        with pytest.raises(StageError, match=message) as caught:
            state.capture()
        assert "'part'" in str(caught.value)


def test_what_has_no_boxes_is_refused_by_name():
    def partial(mesh):
        return DTensor.from_local(numbers(4), mesh, [Replicate(), Partial()])

    def unknown_strides(mesh):
        return split(numbers(24), mesh, [_StridedShard(0, split_factor=3), Shard(0)])

    def uneven(mesh):
        given = [Shard(0), Shard(0)]
        shape, stride = torch.Size([9]), (1,)
        return DTensor.from_local(
            numbers(4), mesh, given, run_check=False, shape=shape, stride=stride
        )

    refused(partial, r"partial results of mesh dimension 1: redistribute\(\) it")
    refused(unknown_strides, "strided cut of 3 pieces, after cuts into 2 parts")
    refused(uneven, r"a part of shape \(3,\), its local tensor has shape \(4,\)")


def test_a_tensor_is_restored_in_place_or_made_whole():
    for rank, mesh in each_rank(2, 2):
        value = split(numbers(4, 4), mesh, [Shard(0), Shard(1)])
        state = ObjectState("o", {"x": value})
        captured = state.capture()
        specs = [leaf.spec for leaf in captured.leaves]
        for live in (value, None):
            target = ObjectState("o", {"x": live})
            arrival = target.prepare(captured.structure, specs, strict=True)
            fill(arrival, ["x"], {"x": 50 + numbers(4, 4).numpy()})
            if live is None:
                assert type(target.value["x"]) is torch.Tensor
                assert target.value["x"].equal(50 + numbers(4, 4))
            else:
                assert target.value["x"] is value
                row, column = divmod(rank, 2)
                own = (slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
                assert value.to_local().equal((50 + numbers(4, 4))[own])


def test_another_dtype_or_shape_is_a_mismatch():
    for _, mesh in each_rank(1, 2):
        state = ModuleState("m", sharded_linear(mesh, 13))
        captured = state.capture()
        specs = [LeafSpec("weight", "F64", (13, 4)), LeafSpec("bias", "F32", (12,))]
        with pytest.raises(StateMismatchError) as caught:
            state.prepare(captured.structure, specs, strict=True)
        assert len(caught.value.problems) == 2


def test_tied_parameters_stay_tied_on_ranks_whose_part_is_empty():
    for _, mesh in each_rank(4, 1):
        net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        net[1].weight = net[0].weight
        fully_shard(net, mesh=mesh["dp"])
        captured = ModuleState("m", net).capture()
        assert captured.structure["ties"] == {"1.weight": "0.weight"}
        names = [leaf.spec.name for leaf in captured.leaves]
        assert names == ["0.weight", "0.bias", "1.bias"]


def test_tied_when_saved_and_separate_now():
    wholes = {"0.weight": numbers(2, 2).numpy()}
    structure = {"ties": {"1.weight": "0.weight"}, "extra": {}}
    specs = [LeafSpec("0.weight", "F32", (2, 2))]

    def layers():
        return torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(2)))

    for rank, mesh in each_rank(2, 1):
        net = layers()
        fully_shard(net, mesh=mesh["dp"])
        arrival = ModuleState("m", net).prepare(structure, specs, strict=True)
        fill(arrival, ["0.weight"], wholes)
        assert net[1].weight.to_local().equal(numbers(2, 2)[rank : rank + 1])
        half = layers()
        fully_shard(half[1], mesh=mesh["dp"])
        with pytest.raises(StateMismatchError, match=r"1.weight is tied .* cut .* another"):
            ModuleState("m", half).prepare(structure, specs, strict=True)


def test_the_gate_and_the_count_of_changes_are_those_of_the_local_tensor():
    for _, mesh in each_rank(1, 2):
        module = sharded_linear(mesh, 13)
        state = ModuleState("m", module)
        state.gate = Gate()
        leaf = state.capture().leaves[0]
        assert leaf.gate is state.gate
        before = leaf.buffer.stamp()
        with torch.no_grad():
            module.weight.add_(1)
        assert leaf.buffer.stamp() > before


def test_a_part_that_overlaps_itself_takes_no_bytes():
    for _, mesh in each_rank(1, 1):
        good = DTensor.from_local(torch.zeros(3, 2).t(), mesh, [Shard(0), Replicate()])
        assert takes_bytes(good)
        assert local_tensor(good).shape == (2, 3)
        spread = torch.zeros(1).expand(3)
        assert not takes_bytes(DTensor.from_local(spread, mesh, [Shard(0), Replicate()]))


def test_a_value_of_a_single_rank_is_no_dtensor():
    for _, mesh in each_rank(1, 2):
        value = {"a": [split(numbers(4), mesh, [Replicate(), Shard(0)])]}
        with pytest.raises(StageError, match="a/0: a DTensor is no value of a single rank"):
            PerRankState("p", value).capture()
