# SPDX-License-Identifier: Apache-2.0
"""What every state of the package keeps to, whatever it holds."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import mpi_ckpt
from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.leaves import dtypes
from mpi_ckpt.leaves.leaf import LeafSpec
from mpi_ckpt.state import LeafState, PartsState, State

if TYPE_CHECKING:
    from collections.abc import Callable


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return module.train()


def trained(seed: int) -> tuple:
    """Return module, optimizer and scheduler after a few steps."""
    module = net(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(seed):
        optimizer.zero_grad()
        module(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    return module, optimizer, scheduler


def shown(value) -> str:
    """Return all of a nested value as text, floats and tensors to the last bit."""
    if isinstance(value, torch.Tensor):
        return shown(value.detach().numpy())
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return type(value).__name__ + "[" + ", ".join(map(shown, value)) + "]"
    return repr(value)


@dataclass
class Case:
    """A state and how to see what it holds."""

    state: State
    look: Callable[[], str]


def arrays(seed: int) -> Case:
    held = {
        "plain": np.arange(6.0).reshape(2, 3) * seed,
        "strided": (np.arange(12, dtype=np.int16) * seed).reshape(3, 4)[:, ::2],
        "big": np.full(3, seed, ">f4"),
        "none": np.empty((0, 2)),
    }
    state = mpi_ckpt.ArrayState("arrays", held)
    return Case(state, lambda: shown(state.arrays))


def module(seed: int) -> Case:
    held = net(seed)
    return Case(mpi_ckpt.ModuleState("module", held), lambda: shown(held.state_dict()))


def optimizer(seed: int) -> Case:
    held = trained(seed)[1]
    return Case(mpi_ckpt.OptimizerState("opt", held), lambda: shown(held.state_dict()))


def scheduler(seed: int) -> Case:
    held = trained(seed)[2]
    return Case(mpi_ckpt.SchedulerState("lr", held), lambda: shown(held.state_dict()))


def train(seed: int) -> Case:
    held = trained(seed)
    state = mpi_ckpt.TrainState(module=held[0], optimizer=held[1], scheduler=held[2])
    return Case(state, lambda: shown([leaf.state_dict() for leaf in held]))


def value(seed: int) -> Case:
    held = {"n": seed, "x": np.arange(seed), (1, 2): {seed}, "nan": float("nan")}
    state = mpi_ckpt.ObjectState("object", held)
    return Case(state, lambda: shown(state.value))


def pickled(seed: int) -> Case:
    state = mpi_ckpt.ObjectState("pickled", Counter({"n": seed}), pickle=True)
    return Case(state, lambda: shown(state.value))


def streams(seed: int) -> Case:
    own = np.random.default_rng(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

    def look() -> str:
        legacy = np.random.get_state()
        seen = [random.getstate(), legacy[1], legacy[2:], torch.get_rng_state()]
        return shown([*seen, own.bit_generator.state])

    return Case(mpi_ckpt.RNGState(generators={"own": own}), look)


def own(seed: int) -> Case:
    state = mpi_ckpt.PerRankState("own", {"n": seed, "x": np.arange(seed)})
    return Case(state, lambda: shown(state.value))


def sums(seed: int) -> Case:
    state = mpi_ckpt.Accumulator({"n": seed, 7: np.full(3, seed / 7)})
    return Case(state, lambda: shown(state._results))


def epochs(seed: int) -> Case:
    state = mpi_ckpt.EpochState()
    state.finished = seed
    return Case(state, lambda: shown(state.finished))


def sampler(seed: int) -> Case:
    state = mpi_ckpt.ElasticSampler(100, 8)
    state.bind(SimpleNamespace(rank=0, size=1))
    state.set_epoch(seed)
    state.record_batch()
    return Case(state, lambda: shown([state.epoch, state.consumed, list(state)]))


MAKERS = [
    *(arrays, module, optimizer, scheduler, train),
    *(value, pickled, streams, own, sums, epochs, sampler),
]

pytestmark = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def put_together(state: State) -> None:
    """Do what a save does first with a state of parts."""
    if isinstance(state, PartsState):
        state.combine([state.part()])
        state.combined()


def taken(state: LeafState) -> tuple:
    """Return structure, specs and bytes of a capture."""
    captured = state.capture()
    leaves = [(leaf.spec, bytes(leaf.buffer.read())) for leaf in captured.leaves]
    return json.dumps(captured.structure), leaves


def test_contents_return_through_a_file(make):
    saved = make(1)
    put_together(saved.state)
    stream = io.BytesIO()
    saved.state.save(stream)
    before = saved.look()
    live = make(3)
    assert live.look() != before
    stream.seek(0)
    live.state.load(stream)
    assert live.look() == before
    assert stream.read() == b""


def test_capture_is_the_same_each_time_and_changes_nothing(make):
    case = make(2)
    before = case.look()
    put_together(case.state)
    assert taken(case.state) == taken(case.state)
    assert case.look() == before


def test_saving_twice_writes_the_same_bytes(make):
    state = make(2).state
    put_together(state)
    streams = [io.BytesIO(), io.BytesIO()]
    for stream in streams:
        state.save(stream)
    assert streams[0].getvalue() == streams[1].getvalue()


def test_leaves_are_what_their_specs_say(make):
    state = make(2).state
    put_together(state)
    captured = state.capture()
    names = [leaf.spec.name for leaf in captured.leaves]
    assert len(set(names)) == len(names)
    for leaf in captured.leaves:
        assert isinstance(leaf.spec.name, str)
        assert dtypes.is_known(leaf.spec.dtype)
        assert all(type(length) is int for length in leaf.spec.shape)
        data = leaf.buffer.read()
        assert (data.format, data.ndim, len(data)) == ("B", 1, leaf.spec.nbytes)
        view = leaf.buffer.view()
        assert view is None or bytes(view) == bytes(data)
        staged = bytearray(len(data))
        leaf.buffer.copy_to(memoryview(staged))
        assert staged == bytes(data)


def test_structure_is_json_that_every_reader_takes(make):
    state = make(2).state
    put_together(state)
    structure = state.capture().structure
    text = json.dumps(structure, allow_nan=False)
    assert json.dumps(json.loads(text)) == text


def test_prepare_gives_a_place_for_every_leaf_and_changes_nothing(make):
    saved, live = make(1), make(3)
    put_together(saved.state)
    structure, leaves = taken(saved.state)
    before = live.look()
    specs = [spec for spec, _ in leaves]
    for _ in range(2):
        arrival = live.state.prepare(json.loads(structure), specs, strict=True)
        assert [leaf.spec for leaf in arrival.leaves] == specs
        assert (arrival.missing, arrival.unexpected) == ((), ())
        assert live.look() == before


@pytest.mark.parametrize("strict", [True, False])
def test_adopt_takes_over_what_arrived(make, strict):
    saved, live = make(1), make(3)
    put_together(saved.state)
    structure, leaves = taken(saved.state)
    wanted = saved.look()
    put_together(live.state)
    specs = [spec for spec, _ in leaves]
    arrival = live.state.prepare(json.loads(structure), specs, strict=strict)
    for (_, data), target in zip(leaves, arrival.leaves, strict=True):
        target.buffer.write(memoryview(data))
    arrival.adopt()
    assert live.look() == wanted
    put_together(live.state)
    assert taken(live.state)[1] == leaves


def test_contents_of_another_kind_are_a_mismatch_and_change_nothing(make):
    case = make(2)
    before = case.look()
    odd = [LeafSpec("odd", "F32", (2, 2))]
    for structure in (None, 5, "text", [], {"odd": 1}, {"~": "tensor", "leaf": "else"}):
        with pytest.raises(StateMismatchError):
            case.state.prepare(structure, odd, strict=True)
        assert case.look() == before


def test_contents_return_through_a_generation(make, manage):
    saved, live = make(1), make(3)
    with manage(saved.state) as manager:
        before = saved.look()
        manager.save()
        assert saved.look() == before
    assert live.look() != before
    manage(live.state).restore()
    assert live.look() == before


def test_every_public_state_is_tried(make):
    public = {
        value
        for name in mpi_ckpt.__all__
        if isinstance(value := getattr(mpi_ckpt, name), type)
        and issubclass(value, LeafState)
    }
    # Of arrays that are cut over the ranks no rank has all bytes: see distributed/.
    public -= {mpi_ckpt.ShardedArrayState, mpi_ckpt.ConcatState}
    assert type(make(1).state) in public
    assert public == {type(maker(1).state) for maker in MAKERS}
