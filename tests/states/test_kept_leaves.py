# SPDX-License-Identifier: Apache-2.0
"""A capture that is kept from save to save is always the one that a new walk would make."""

import gc
import json
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpi_ckpt import ModuleState, OptimizerState, TrainState
from mpi_ckpt.states import kept_leaves, module, optimizer
from mpi_ckpt.states.buffers.tensor_bytes import TensorBuffer

torch = pytest.importorskip("torch")


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3))
        self.bias = torch.nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("scratch", torch.randn(2), persistent=False)


class Speaking(Block):
    def get_extra_state(self):
        return {"said": 1}

    def set_extra_state(self, state):
        pass


class Training:
    """A module and its optimizer, which change in ways drawn by the test."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(Block(), torch.nn.BatchNorm1d(3), Block())
        self.adam = torch.optim.Adam(self.net.parameters(), lr=0.1)

    @property
    def param(self):
        return next(iter(self.net.parameters()))

    def step(self):
        for one in self.adam.param_groups[0]["params"]:
            one.grad = torch.ones_like(one)
        self.adam.step()

    def entry(self):
        self.step()
        return self.adam.state[self.adam.param_groups[0]["params"][0]]


def _set_other_memory(t):
    t.param.data = t.param.data.clone()


def _free_and_refill(t):
    freed, kept = t.param.untyped_storage(), t.param.data.clone()
    freed.resize_(0)
    # As a rule at the address that has just become free.
    t.param.data = torch.empty_like(kept).copy_(kept)


def _grow_and_shrink(t):
    t.param.untyped_storage().resize_(1 << 16)


def _swap_halves(t):
    first, second = t.net[0], t.net[2]
    first.weight, second.weight = second.weight, first.weight


def _tie(t):
    t.net[2].weight = t.net[0].weight


def _tie_memory(t):
    t.net[2].weight.data = t.net[0].weight.data


def _say(t):
    t.net[0].__class__ = Speaking


def _hook_module(t):
    t.net.register_state_dict_post_hook(lambda *args: args[1].clear())


def _hook_optimizer(t):
    t.adam.register_state_dict_post_hook(lambda _, state: {**state, "state": {}})


def _own_state_dict(t):
    whole = type(t.net).state_dict
    t.net.state_dict = lambda **given: {"all": next(iter(whole(t.net, **given).values()))}


def _add_group(t):
    t.adam.add_param_group({"params": [torch.nn.Parameter(t.param + 1)]})


def _reverse_groups(t):
    t.adam.param_groups[0]["params"].reverse()


CHANGES = {
    "nothing": lambda t: None,
    "values": lambda t: t.param.data.add_(1),
    "other memory": _set_other_memory,
    "freed and refilled": _free_and_refill,
    "storage moved": _grow_and_shrink,
    "dtype": lambda t: setattr(t.param, "data", t.param.data.double()),
    "shape": lambda t: setattr(t.param, "data", torch.ones(2, 5)),
    "resized": lambda t: t.net[0].mean.resize_(7).zero_(),
    "transposed": lambda t: t.net[0].weight.data.t_(),
    "strides": lambda t: setattr(t.param, "data", torch.randn(3, 3).t()),
    "expanded": lambda t: setattr(t.net[0], "mean", torch.zeros(1).expand(3)),
    "conjugate": lambda t: setattr(t.net[0].phase, "data", t.net[0].phase.data.conj()),
    "sparse": lambda t: setattr(t.net[0], "mean", torch.eye(3).to_sparse()),
    "replaced": lambda t: setattr(t.net[0], "bias", torch.nn.Parameter(torch.ones(3))),
    "frozen": lambda t: t.param.requires_grad_(not t.param.requires_grad),
    "added": lambda t: t.net[0].register_parameter("more", torch.nn.Parameter(t.param + 1)),
    "removed": lambda t: t.net[0].register_parameter("bias", None),
    "buffer added": lambda t: t.net[2].register_buffer("count", torch.ones(())),
    "sparse and not saved": lambda t: t.net[0].register_buffer(
        "scratch", torch.eye(3).to_sparse(), persistent=False
    ),
    "persistent": lambda t: t.net[0].register_buffer("scratch", torch.ones(2)),
    "not persistent": lambda t: t.net[0]._non_persistent_buffers_set.add("mean"),
    "module replaced": lambda t: t.net.__setitem__(2, Block()),
    "module added": lambda t: t.net.append(torch.nn.Linear(2, 2)),
    "module removed": lambda t: t.net.__delitem__(len(t.net) - 1),
    "lazy": lambda t: t.net.append(torch.nn.LazyLinear(2)),
    "swapped": _swap_halves,
    "tied": _tie,
    "memory tied": _tie_memory,
    "version": lambda t: setattr(t.net[1], "_version", 1),
    "extra state": _say,
    "hook": _hook_module,
    "own state dict": _own_state_dict,
    "step": Training.step,
    "rate": lambda t: t.adam.param_groups[0].update(lr=0.5),
    "rate a tensor": lambda t: t.adam.param_groups[0].update(lr=torch.tensor(0.5)),
    "rate a truth": lambda t: t.adam.param_groups[0].update(lr=True),
    "key of a group": lambda t: t.adam.param_groups[0].update(mine=(1, 2.5)),
    "many numbers": lambda t: t.adam.param_groups[0].update(mine=[0.5] * 300),
    "group": lambda t: t.adam.add_param_group(
        {"params": [torch.nn.Parameter(t.param + 1)]}
    ),
    "order": _reverse_groups,
    "state cleared": lambda t: t.adam.state.clear(),
    "state scalar": lambda t: t.entry().update(seen=1),
    "state scalar a float": lambda t: t.entry().update(seen=1.0),
    "state negative zero": lambda t: t.entry().update(seen=-0.0),
    "state zero": lambda t: t.entry().update(seen=0.0),
    "state list": lambda t: t.entry().update(seen=[1, torch.ones(2)]),
    "state key removed": lambda t: t.entry().pop("step"),
    "state replaced": lambda t: t.entry().update(exp_avg=torch.ones(5)),
    "state a parameter": lambda t: t.entry().update(exp_avg=t.param),
    "state loaded": lambda t: t.adam.load_state_dict(t.adam.state_dict()),
    "hook of the optimizer": _hook_optimizer,
}


# Memory that is taken from a tensor may be another one's by then, which a step would use.
DRAWN = [
    change
    for change in CHANGES
    if change not in ("freed and refilled", "storage moved", "resized")
]


def contents(state):
    try:
        captured = state.capture()
    except Exception as error:  # the same from both, also of the functions drawn here
        return type(error), str(error)
    return (
        json.dumps(captured.structure),
        [(leaf.spec, bytes(leaf.buffer.read())) for leaf in captured.leaves],
        # Lists of numbers become new arrays in each walk.
        [
            leaf.buffer.place()
            for leaf in captured.leaves
            if isinstance(leaf.buffer, TensorBuffer)
        ],
        captured.whole_specs,
        [leaf.gate is not None for leaf in captured.leaves],
        captured.names,
    )


def states_of(t):
    """Return states that have captured nothing yet."""
    return [
        ModuleState("module", t.net),
        OptimizerState("optimizer", t.adam, module=t.net),
        OptimizerState("nameless", t.adam),
        TrainState(t.net, t.adam),
        TrainState(t.net, t.adam, overlap=True),
    ]


@pytest.mark.parametrize("large", [False, True])
@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(st.sampled_from(DRAWN), min_size=1, max_size=6))
def test_kept_captures_are_those_of_a_new_walk(large, drawn):
    with pytest.MonkeyPatch.context() as patched:
        if large:  # leaves that are made anew each time
            patched.setattr(kept_leaves, "_KEPT_BYTES_MAX", 20)
        t = Training()
        states = states_of(t)
        for change in ["nothing", *drawn, "nothing"]:
            try:
                CHANGES[change](t)
            except (RuntimeError, LookupError, AttributeError, TypeError, ValueError):
                pass  # changes before have made this one impossible
            except StopIteration:
                return
            for kept, new in zip(states, states_of(t), strict=True):
                assert contents(kept) == contents(new), change


# What only the second of two changes shows: equal numbers of other types, or other signs.
PAIRS = [
    ("state scalar", "state scalar a float"),
    ("state zero", "state negative zero"),
    ("rate", "rate a truth"),
]


@pytest.mark.parametrize("changes", [*PAIRS, *(("nothing", change) for change in CHANGES)])
def test_each_change_is_noticed(changes):
    t = Training()
    t.step()
    CHANGES[changes[0]](t)
    states = states_of(t)
    for state in states:
        state.capture()  # nothing is read: torch resizes no memory that NumPy has seen
    CHANGES[changes[1]](t)
    for kept, new in zip(states, states_of(t), strict=True):
        assert contents(kept) == contents(new)


@pytest.mark.parametrize("change", ["nothing", "values", "rate", "step"])
def test_unchanged_training_is_not_walked_through_again(change, monkeypatch):
    t = Training()
    t.step()
    state = TrainState(t.net, t.adam)
    before = state.capture()
    CHANGES[change](t)

    def refuse(*_):
        raise AssertionError("it was walked through")

    monkeypatch.setattr(module, "ModuleContents", refuse)
    monkeypatch.setattr(optimizer, "flatten", refuse)
    after = state.capture()
    assert after.leaves is before.leaves or after.leaves == before.leaves
    assert state.capture().leaves is after.leaves
    assert state.form_of(after.whole_specs) is state.form_of(before.whole_specs)


def test_what_the_program_drops_is_not_kept_alive():
    t = Training()
    states = states_of(t)
    for state in states:
        state.capture()
    dropped = [weakref.ref(t.net[2]), weakref.ref(t.net[2].weight)]
    t.net[2] = torch.nn.Identity()
    t.adam = None
    del states[1:], state
    gc.collect()
    assert [one() for one in dropped] == [None, None]
    assert states[0].capture().names[0] == "0.weight"


def test_a_tensor_without_an_address_may_take_the_place_of_another():
    training = Training()
    state = ModuleState("module", training.net)
    state.capture()
    buffers = training.net[0]._buffers
    tensors, kept = state._kept._parts.find(), state._kept._leaves
    assert kept.find(tensors, {}) is not None
    # As one whose object is where that of a dropped tensor was, so that no id differs.
    others = [torch.eye(3).to_sparse() if t is buffers["mean"] else t for t in tensors]
    assert kept.find(others, {}) is None
