# SPDX-License-Identifier: Apache-2.0
"""Replicas made equal: nothing is sent that is equal, root wins, means are means."""

import io

import numpy as np
import pytest

from mpi_ckpt import (
    ArrayState,
    ModuleState,
    ObjectState,
    OptimizerState,
    SchedulerState,
    State,
    TrainState,
)
from mpi_ckpt.errors import DivergedError, SaveError, StageError, StateMismatchError
from mpi_ckpt.options import IO
from mpi_ckpt.states.buffers.array_bytes import ArrayBuffer
from mpi_ckpt.states.nested import NestedState
from tests.ranks import RecordingHandle, assert_same, manager, plain, same_error

torch = pytest.importorskip("torch")


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(7, 11), torch.nn.BatchNorm1d(11), torch.nn.Linear(11, 3)
    )


def contents(state):
    """Return all that a state holds, as text that can be compared."""
    captured = state.capture()
    return str(captured.structure), {
        str(leaf.spec): bytes(leaf.buffer.read()) for leaf in captured.leaves
    }


def train(model, optimizer):
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 35).reshape(5, 7)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.fixture
def training():
    """Everything that a training has, the same on every rank."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    train(model, optimizer)
    scheduler.step()
    return model, optimizer, scheduler


def test_equal_replicas_send_nothing(comm, shared_path, training):
    model, optimizer, scheduler = training
    states = [
        ModuleState("model", model),
        OptimizerState("optimizer", optimizer),
        SchedulerState("scheduler", scheduler),
        ArrayState("arrays", {"x": np.arange(1000.0), "nothing": np.zeros((0, 3))}),
        ObjectState("objects", {"a": [1, 2.5, None], "b": {3, 1, 2}, "t": torch.ones(3)}),
    ]
    with manager(shared_path, *states) as checkpoints:
        with RecordingHandle(checkpoints._session.comm) as handle:
            report = checkpoints.sync()
            assert handle.sent_by("Ibcast") == 0
        assert report.differing == {}
        assert report.bytes_sent == 0
        # With one rank there is nothing to compare; a save digests what it writes.
        assert (report.bytes_hashed > 8000) == (comm.size > 1)
        assert checkpoints.save().sync == report
    assert_same(comm, report)


def test_only_the_leaf_that_differs_is_sent(comm, shared_path):
    model = make_model()
    state = ModuleState("model", model)
    before = contents(state)
    with manager(shared_path, state) as checkpoints:
        for culprit in range(comm.size):
            if comm.rank == culprit:
                with torch.no_grad():
                    model[2].weight[1, 2] += 1 + culprit
            roots = comm.bcast(contents(state))
            with RecordingHandle(checkpoints._session.comm) as handle:
                report = checkpoints.sync()
            assert contents(state) == roots
            if comm.size == 1:
                assert report.differing == {}
                continue
            assert report.differing == {"model": ("2.weight",)}
            assert report.bytes_sent == 3 * 11 * 4
            # The leaf and nothing else: the ranks agree on the form of its state.
            assert handle.sent_by("Ibcast") == 3 * 11 * 4
            assert checkpoints.sync().differing == {}
    # What root changed has stayed, what others changed has not.
    expected = before[1]["2.weight F32[3, 11]"]
    assert contents(state)[1]["2.weight F32[3, 11]"] != expected
    assert contents(state)[1]["0.weight F32[11, 7]"] == before[1]["0.weight F32[11, 7]"]


def make_large(rank, strided_on=()):
    """Arrays of 640 kB that differ between ranks in several places, or nowhere."""
    arrays = {name: np.arange(80_000.0) for name in ("all", "equal", "first", "last")}
    arrays["all"] += rank
    arrays["first"][0] = -rank
    arrays["last"][-1] = -rank
    arrays["laid out"] = np.full(80_000, float(rank))
    if rank in strided_on:
        arrays["laid out"] = np.full((80_000, 2), float(rank))[:, 0]
    return arrays


@pytest.mark.parametrize("save", [False, True])
def test_large_leaves_that_plainly_differ_are_found_without_a_digest(
    comm, shared_path, save
):
    states = {
        "root": make_large(comm.rank, strided_on=[comm.size - 1]),
        "same": make_large(0),
        "other": {"x": np.zeros(80_000, "fi"[comm.rank > 0] + "8")},
        "small": {"x": np.full(10, comm.rank)},
    }
    targets = [ArrayState(name, arrays, sync="root") for name, arrays in states.items()]
    targets[2] = ObjectState("other", states["other"], sync="root")
    with manager(shared_path, *targets) as checkpoints:
        report = checkpoints.save().sync if save else checkpoints.sync()
        again = checkpoints.sync()
    assert_same(comm, report)
    assert (again.differing, again.bytes_sent) == ({}, 0)
    for name, array in make_large(0).items():
        assert np.array_equal(states["root"][name], array), name
    if comm.size == 1:
        return
    differing = {**report.differing}
    assert differing.pop("other") == ("(structure)", "x")
    assert differing == {"root": ("all", "first", "last", "laid out"), "small": ("x",)}
    assert again.bytes_hashed > 10 * 640_000
    # Not "all" and "first"; "laid out" cannot be looked at on every rank.
    assert again.bytes_hashed - report.bytes_hashed == (0 if save else 2 * 640_000)


def test_leaf_that_cannot_be_looked_at_is_an_error_on_all_ranks(
    comm, shared_path, monkeypatch
):
    if comm.size == 1:
        pytest.skip("one rank compares nothing")
    arrays = make_large(comm.rank)
    with manager(shared_path, ArrayState("arrays", arrays)) as checkpoints:
        with monkeypatch.context() as patched:
            if comm.rank == comm.size - 1:
                patched.setattr(ArrayBuffer, "view", lambda _: 1 / 0)
            with same_error(comm, StageError, f"rank {comm.size - 1}", "ZeroDivision"):
                checkpoints.sync()
        assert arrays["all"][0] == comm.rank
        checkpoints.sync()
    assert arrays["all"][0] == 0


@pytest.mark.parametrize("sync", ["mean", "check"])
def test_other_modes_need_all_digests(comm, shared_path, sync):
    arrays = make_large(comm.rank if sync == "mean" else 0)
    with manager(shared_path, ArrayState("arrays", arrays, sync=sync)) as checkpoints:
        report = checkpoints.sync()
    assert arrays["all"][0] == (comm.size - 1) / 2 * (sync == "mean")
    assert report.bytes_hashed == (5 * 640_000 if comm.size > 1 else 0)


def test_root_wins_in_everything(comm, shared_path):
    model = make_model(seed=comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 + comm.rank, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1 + comm.rank)
    train(model, optimizer)
    state = TrainState(module=model, optimizer=optimizer, scheduler=scheduler)
    arrays = {"x": np.full(10, comm.rank), "y": np.zeros(2)}
    roots = comm.bcast(contents(state))
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with manager(shared_path, state, ArrayState("arrays", arrays)) as checkpoints:
        report = checkpoints.sync()
    assert_same(comm, plain_differing(report))
    assert contents(state) == roots
    assert arrays["x"].tolist() == [0] * 10
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    if comm.size > 1:
        assert report.differing["arrays"] == ("x",)
        assert "(structure)" in report.differing["train"]


def plain_differing(report):
    return {name: list(leaves) for name, leaves in report.differing.items()}


DTYPES = ["float64", "float32", "float16", "bfloat16", "complex64", "complex128"]


@pytest.mark.parametrize("message_bytes", [64, 1 << 20])
def test_the_mean_of_tensors(comm, shared_path, message_bytes):
    values = {
        f"{dtype}_": (torch.arange(100) + comm.rank * 4).to(getattr(torch, dtype))
        for dtype in DTYPES
    }
    values["complex64_"] += 1j * comm.rank
    integers = {
        f"{dtype}_": torch.full((5,), comm.rank).to(getattr(torch, dtype))
        for dtype in ("int64", "int32", "uint8", "bool")
    }
    same = torch.arange(5.0)
    strided = torch.zeros(4, 6).t()[1:] + comm.rank
    module = torch.nn.Module()
    for name, value in {**values, **integers, "same": same, "strided": strided}.items():
        module.register_buffer(name, value)
    state = ModuleState("mean", module, sync="mean")
    with manager(
        shared_path, state, io=IO(message_bytes=message_bytes, window_bytes=1)
    ) as checkpoints:
        with RecordingHandle(checkpoints._session.comm) as handle:
            report = checkpoints.save()
        assert handle.largest <= message_bytes
        shift = (comm.size - 1) / 2
        for name, value in values.items():
            expected = (torch.arange(100) + 4 * shift).to(value.dtype)
            if value.dtype == torch.complex64:
                expected = expected + 1j * shift
            assert torch.equal(module.get_buffer(name), expected), name
        for name in integers:
            assert not module.get_buffer(name).any()
        assert torch.equal(module.get_buffer("same"), torch.arange(5.0))
        assert torch.equal(module.get_buffer("strided"), torch.full((5, 4), shift))
        assert_same(comm, contents(state))
        saved = contents(state)
        if comm.size > 1:
            assert set(report.sync.differing["mean"]) == {*values, *integers, "strided"}
        # What was saved is the mean, and its digests are those of the mean.
        for value in module.buffers():
            value.zero_()
        checkpoints.restore()
        assert contents(state) == saved


def test_the_mean_is_rounded_once(comm, shared_path):
    # In bfloat16 256 + 257 / 2 would be lost in the sum already.
    arrays = torch.full((4,), 256.0 if comm.rank % 2 else 258.0, dtype=torch.bfloat16)
    module = torch.nn.Module()
    module.register_buffer("x", arrays)
    with manager(shared_path, ModuleState("m", module, sync="mean")) as checkpoints:
        checkpoints.sync()
    exact = sum(256.0 if rank % 2 else 258.0 for rank in range(comm.size)) / comm.size
    expected = torch.tensor(exact, dtype=torch.float32).to(torch.bfloat16)
    assert module.x.tolist() == [expected.item()] * 4


def test_the_mean_of_values_that_are_not_in_place(comm, shared_path):
    value = {"scalar": np.float64(comm.rank), "array": np.full(3, comm.rank, "f4"), "n": 1}
    state = ObjectState("objects", value, sync="mean")
    mean = (comm.size - 1) / 2
    with manager(shared_path, state) as checkpoints:
        checkpoints.save()
        assert state.value["scalar"] == mean
        assert state.value["array"].tolist() == [mean] * 3
        state.value = None
        checkpoints.restore()
    assert state.value["scalar"] == mean
    assert type(state.value["scalar"]) is np.float64


def test_a_mean_of_other_forms_is_roots(comm, shared_path):
    state = ObjectState(
        "objects", {"x": np.full(2 + comm.rank, 1.0 + comm.rank)}, sync="mean"
    )
    with manager(shared_path, state) as checkpoints:
        checkpoints.sync()
    assert state.value["x"].tolist() == [1, 1]


def test_check_names_the_leaves_that_differ(comm, shared_path):
    arrays = {"a": np.zeros(3), "b": np.zeros(3), "c": np.zeros(3)}
    state = ArrayState("checked", arrays, sync="check")
    value = ObjectState("plain", {"epoch": 3}, sync="check")
    with manager(shared_path, state, value) as checkpoints:
        assert checkpoints.save().sync.differing == {}
        if comm.size == 1:
            return
        if comm.rank == comm.size - 1:
            arrays["b"][1] = 1
            arrays["c"][2] = 1
            value.value["epoch"] = 4
        with same_error(
            comm,
            DivergedError,
            "state 'checked': b, c differ between ranks",
            "state 'plain': (structure) differ between ranks",
        ) as caught:
            checkpoints.save()
        assert len(caught.error.problems) == 2
        assert [info.generation for info in checkpoints.generations()] == [1]
        # Nothing was changed either.
        assert comm.allgather(arrays["b"][1]) == [0] * (comm.size - 1) + [1]
        arrays["b"][1] = arrays["c"][2] = 0
        value.value["epoch"] = 4
        assert checkpoints.save().generation == 2


def test_check_of_other_forms(comm, shared_path):
    arrays = {"a": np.zeros(3 + (comm.rank == comm.size - 1))}
    with manager(shared_path, ArrayState("checked", arrays, sync="check")) as checkpoints:
        if comm.size == 1:
            checkpoints.save()
        else:
            with same_error(comm, DivergedError, "(structure)"):
                checkpoints.save()
            with same_error(comm, StateMismatchError, "a F64[3]", "a F64[4]"):
                checkpoints.sync()


def test_none_leaves_ranks_apart_and_saves_no_rank_for_all(comm, shared_path):
    arrays = {"x": np.full(4, comm.rank + 10)}
    state = ArrayState("apart", arrays, sync="none")
    with manager(shared_path, state) as checkpoints:
        assert checkpoints.sync().differing == {}
        assert arrays["x"].tolist() == [comm.rank + 10] * 4
        if comm.size > 1:
            with same_error(comm, DivergedError, "'apart': x", "PerRankState"):
                checkpoints.save()
            assert arrays["x"].tolist() == [comm.rank + 10] * 4
        assert checkpoints.save(sync=False).sync.differing == {}
        arrays["x"][:] = 7
        assert checkpoints.save().generation == 2


@pytest.mark.parametrize("kind", ["Adam", "SGD", "Adagrad", "LBFGS"])
def test_optimizer_state_of_root_alone(comm, shared_path, kind):
    model = make_model()
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)
    if comm.rank == 0:
        twin = make_model()
        source = getattr(torch.optim, kind)(twin.parameters(), lr=0.01, **options)

        def closure():
            source.zero_grad()
            loss = twin(torch.ones(5, 7)).square().mean()
            loss.backward()
            return loss

        source.step(closure)
        optimizer.load_state_dict(source.state_dict())
    else:
        optimizer.step = None  # whoever calls it fails
    parameters = [parameter.clone() for parameter in model.parameters()]
    state = OptimizerState("optimizer", optimizer)
    roots = comm.bcast(contents(state))
    with manager(shared_path, state) as checkpoints:
        report = checkpoints.sync()
    assert contents(state) == roots
    assert "exp_avg" in roots[0] or kind != "Adam"
    for parameter, before in zip(model.parameters(), parameters, strict=True):
        assert torch.equal(parameter, before)
        assert parameter.grad is None
    assert all(key in set(model.parameters()) for key in optimizer.state)
    assert bool(report.differing) == (comm.size > 1)


def test_objects_of_other_shapes_and_kinds(comm, shared_path):
    values = [
        {"x": np.arange(3), "deep": [{"t": torch.ones(2, 2)}, "text"], "n": np.float32(1)},
        {"x": np.arange(5)},
        None,
        [1, 2, 3],
    ]
    state = ObjectState("objects", values[comm.rank])
    kept = ObjectState("kept", {"x": np.zeros(4) + comm.rank, "y": np.ones(3)})
    live = kept.value["x"]
    with manager(shared_path, state, kept) as checkpoints:
        report = checkpoints.sync()
    assert_same(comm, contents(state))
    assert state.value["x"].tolist() == [0, 1, 2]
    assert state.value["deep"][1] == "text"
    assert state.value["deep"][0]["t"].tolist() == [[1, 1], [1, 1]]
    assert type(state.value["n"]) is np.float32
    assert kept.value["x"] is live, "restored in place where it fits"
    assert live.tolist() == [0] * 4
    if comm.size > 1:
        assert report.differing == {
            "objects": ("(structure)", "x", "deep/0/t", "n")[
                : len(report.differing["objects"])
            ],
            "kept": ("x",),
        }


def test_pickled_values(comm, shared_path):
    state = ObjectState("pickled", complex(comm.rank, 1), pickle=True)
    with manager(shared_path, state) as checkpoints:
        checkpoints.sync()
    assert state.value == complex(0, 1)


def test_tensors_that_are_not_contiguous(comm, shared_path):
    weight = torch.arange(12.0).reshape(3, 4).t() + comm.rank
    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(weight))
    module.register_buffer("sliced", torch.arange(20).reshape(4, 5)[:, 1:3] + comm.rank)
    module.register_buffer(
        "conjugate", torch.ones(3, dtype=torch.complex64).conj() * (1 + 1j)
    )
    module.register_buffer("empty", torch.zeros(0, 4)[:, ::2])
    strides = [value.stride() for value in module.state_dict().values()]
    state = ModuleState("strided", module)
    roots = comm.bcast(contents(state))
    with manager(shared_path, state, io=IO(message_bytes=64)) as checkpoints:
        report = checkpoints.save()
        assert contents(state) == roots
        for value in module.state_dict().values():
            value.zero_()
        checkpoints.restore()
    assert contents(state) == roots
    assert [value.stride() for value in module.state_dict().values()] == strides
    if comm.size > 1:
        assert report.sync.differing == {"strided": ("w", "sliced")}
        assert report.sync.bytes_sent == 12 * 4 + 8 * 8


def test_small_messages_and_windows(comm, shared_path):
    stream = np.random.default_rng(comm.rank)
    arrays = {f"a{i}": stream.integers(0, 255, size=i * 37, dtype="u1") for i in range(40)}
    wide = {"wide": stream.standard_normal((100, 200))}
    states = [ArrayState("many", arrays), ArrayState("wide", wide)]
    with manager(
        shared_path, *states, io=IO(message_bytes=64, window_bytes=1)
    ) as checkpoints:
        with RecordingHandle(checkpoints._session.comm) as handle:
            checkpoints.sync()
        assert handle.largest <= 64
    for state in states:
        assert_same(comm, contents(state))
    expected = np.random.default_rng(0)
    assert all(
        np.array_equal(arrays[f"a{i}"], expected.integers(0, 255, size=i * 37, dtype="u1"))
        for i in range(40)
    )


class UserState(State):
    """What a user of adaptdl has: its own MPI calls in sync()."""

    def __init__(self, comm):
        super().__init__("mine")
        self.comm = comm
        self.value = float(comm.rank)
        self.calls = []

    def save(self, fileobj):
        self.calls.append("save")
        fileobj.write(repr(self.value).encode())

    def load(self, fileobj):
        self.calls.append("load")
        self.value = float(fileobj.read())

    def sync(self):
        self.calls.append("sync")
        self.value = self.comm.allreduce(self.value)


def test_sync_of_the_users_own(comm, shared_path):
    state = UserState(comm)
    expected = comm.size * (comm.size - 1) / 2
    with manager(shared_path, state) as checkpoints:
        checkpoints.save()
        assert state.value == expected
        assert state.calls == ["sync", "save"] if comm.rank == 0 else ["sync"]
        state.value = -1.0
        checkpoints.restore()
        assert state.value == expected
        state.calls.clear()
        checkpoints.save(sync=False)
        assert state.calls == (["save"] if comm.rank == 0 else [])


def test_sync_of_the_user_that_fails_on_one_rank(comm, shared_path):
    class Failing(State):
        def sync(self):
            if comm.rank == comm.size - 1:
                raise ZeroDivisionError("in the user's sync")

    state = Failing("mine")
    with manager(shared_path, state, ArrayState("a", {"x": np.zeros(1)})) as checkpoints:
        with same_error(
            comm,
            StageError,
            f"rank {comm.size - 1} of {comm.size}",
            "sync() of state 'mine'",
            "in the user's sync (ZeroDivisionError)",
        ):
            checkpoints.save()
        assert isinstance(StageError("x"), SaveError)
        Failing.sync = State.sync
        assert checkpoints.save().generation == 1


def test_root_contents_that_do_not_fit_a_rank(comm, shared_path):
    if comm.size == 1:
        model = make_model()
    else:
        model = torch.nn.Linear(2, 2 + (comm.rank == comm.size - 1))
    before = [parameter.clone() for parameter in model.parameters()]
    with manager(shared_path, ModuleState("model", model)) as checkpoints:
        if comm.size == 1:
            checkpoints.sync()
        else:
            with same_error(comm, StateMismatchError, "weight F32[2, 2]", "[3, 2]"):
                checkpoints.sync()
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_tied_and_frozen_parameters(comm, shared_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    with torch.no_grad():
        model[0].weight.fill_(comm.rank)
        model[0].bias.fill_(comm.rank)
        model[1].bias.fill_(5)
    with manager(shared_path, ModuleState("model", model)) as checkpoints:
        report = checkpoints.sync()
    assert model[1].weight is model[0].weight
    assert not model[0].weight.any()
    assert not model[0].bias.any()
    assert not model[0].bias.requires_grad
    if comm.size > 1:
        assert report.differing == {"model": ("0.weight", "0.bias")}


def test_sync_of_some(comm, shared_path):
    one_array, other = {"x": np.full(2, comm.rank)}, {"x": np.full(2, comm.rank)}
    states = [ArrayState("one", one_array), ArrayState("other", other)]
    with manager(shared_path, *states) as checkpoints:
        checkpoints.sync(only=["other"])
    assert one_array["x"].tolist() == [comm.rank] * 2
    assert other["x"].tolist() == [0, 0]
    assert comm.bcast(list(shared_path.iterdir())) == []


def test_nan_and_negative_zero_are_compared_by_their_bytes(comm, shared_path):
    arrays = {"nan": np.full(3, np.nan), "zero": np.full(3, -0.0 if comm.rank else 0.0)}
    with manager(shared_path, ArrayState("a", arrays)) as checkpoints:
        report = checkpoints.sync()
    assert not np.signbit(arrays["zero"]).any()
    assert report.differing == ({"a": ("zero",)} if comm.size > 1 else {})


def test_states_that_write_themselves_are_the_same_stream(comm, shared_path, training):
    model, optimizer, _ = training
    state = TrainState(module=model, optimizer=optimizer)
    stream = io.BytesIO()
    state.save(stream)
    assert_same(comm, stream.getvalue())
    assert issubclass(OptimizerState, NestedState)
    with manager(shared_path, state) as checkpoints:
        assert plain(checkpoints.save()).sync.differing == {}
