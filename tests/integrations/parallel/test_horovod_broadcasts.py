# SPDX-License-Identifier: Apache-2.0
"""Broadcasts with Horovod's signatures, without Horovod: they need MPI and nothing else."""

import numpy as np
import pytest
import torch

from mpi_ckpt.errors import (
    OptionsError,
    StageError,
    StateMismatchError,
)
from mpi_ckpt.integrations import horovod
from mpi_ckpt.integrations.horovod import object_exchange, parameters
from mpi_ckpt.integrations.horovod.packing import pack
from tests.ranks import assert_same, same_error

DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("complex64", "complex128", "bool", "uint8", "uint16", "uint32", "uint64"),
    *("int8", "int16", "int32", "int64"),
]


@pytest.fixture
def reports(monkeypatch):
    """The reports of the syncs that are made below."""
    found = []
    sync = parameters.sync_states

    def note(*arguments, **options):
        synced = sync(*arguments, **options)
        found.append(synced.report)
        return synced

    monkeypatch.setattr(parameters, "sync_states", note)
    return found


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).tolist()


def model(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def train(net, optimizer):
    def loss():
        optimizer.zero_grad()
        value = net(torch.ones(2, 4)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)


class TestParameters:
    @pytest.mark.parametrize("name", DTYPES)
    def test_every_dtype_from_every_root(self, comm, name):
        dtype = getattr(torch, name)
        for root in range(comm.size):
            raw = torch.full((2, 16), (comm.rank == root) + 0, dtype=torch.uint8)
            tensor = raw.view(dtype)
            expected = bits(torch.full((2, 16), 1, dtype=torch.uint8).view(dtype))
            horovod.broadcast_parameters({"t": tensor}, root_rank=root)
            assert bits(tensor) == expected

    @pytest.mark.parametrize(
        "form",
        [
            lambda net: net.state_dict(),
            lambda net: net.named_parameters(),
            lambda net: list(net.named_parameters()),
            lambda net: net.parameters(),
            lambda net: list(net.parameters()),
            lambda net: {name: p.data.numpy() for name, p in net.named_parameters()},
        ],
        ids=["state dict", "named generator", "pairs", "generator", "list", "arrays"],
    )
    def test_every_form_in_place(self, comm, form):
        net = model(comm.rank)
        addresses = [p.data_ptr() for p in net.parameters()]
        root = comm.size - 1
        horovod.broadcast_parameters(form(net), root)
        expected = [bits(p) for p in model(root).parameters()]
        assert [bits(p) for p in net.parameters()] == expected
        assert [p.data_ptr() for p in net.parameters()] == addresses

    def test_any_layout(self, comm):
        turned = torch.arange(6.0).reshape(2, 3).t() + comm.rank
        every_other = torch.arange(10) * (comm.rank + 1)
        channels = torch.full((2, 3, 4, 4), float(comm.rank))
        channels = channels.to(memory_format=torch.channels_last)
        given = {"a": turned, "b": every_other[::2], "c": channels, "d": torch.ones(0, 3)}
        horovod.broadcast_parameters(given)
        assert turned.tolist() == torch.arange(6.0).reshape(2, 3).t().tolist()
        assert every_other[::2].tolist() == [0, 2, 4, 6, 8]
        assert every_other[1::2].tolist() == [n * (comm.rank + 1) for n in (1, 3, 5, 7, 9)]
        assert channels.is_contiguous(memory_format=torch.channels_last)
        assert not channels.any()

    def test_only_what_differs_is_sent(self, peers, reports):
        net = model(0)
        horovod.broadcast_parameters(net.state_dict())
        assert reports[-1].bytes_sent == 0
        with torch.no_grad():
            net[1].bias += peers.rank
        horovod.broadcast_parameters(net.state_dict())
        assert reports[-1].bytes_sent == net[1].bias.numel() * 4

    def test_values_that_are_no_tensors_are_replaced(self, comm):
        given = {"epoch": comm.rank, "note": f"of {comm.rank}", "w": torch.ones(1)}
        horovod.broadcast_parameters(given, comm.size - 1)
        assert given["epoch"] == comm.size - 1
        assert given["note"] == f"of {comm.size - 1}"
        pairs = [("epoch", comm.rank), ("w", torch.ones(1))]
        horovod.broadcast_parameters(pairs)
        assert pairs[0] == ("epoch", 0)
        plain = [comm.rank, torch.ones(1)]
        horovod.broadcast_parameters(plain)
        assert plain[0] == 0

    def test_a_generator_cannot_take_what_is_no_tensor(self, peers):
        pairs = [("epoch", peers.rank), ("w", torch.full((2,), float(peers.rank)))]
        with same_error(peers, StateMismatchError, "epoch is no tensor and differs"):
            horovod.broadcast_parameters(iter(pairs))
        assert pairs[1][1].tolist() == [peers.rank] * 2
        horovod.broadcast_parameters(iter([("epoch", 7), pairs[1]]))  # equal: no trouble
        assert pairs[1][1].tolist() == [0.0] * 2

    def test_models_that_differ_are_all_told_and_untouched(self, peers):
        last = peers.size - 1
        odd = peers.rank == last
        given = {"w": torch.full((3 if odd else 2,), 1.0), "x": torch.ones(1) + peers.rank}
        given["dtype"] = torch.ones(2, dtype=torch.float64 if odd else torch.float32)
        given["more" if odd else "less"] = torch.ones(1)
        parts = (
            f"rank {last} of {peers.size}",
            "root has w F32[2], this rank w F32[3]",
            "root has dtype F32[2], this rank dtype F64[2]",
            "root has less, this rank has not",
            "this rank has more, root has not",
            "nothing was changed",
        )
        with same_error(peers, StateMismatchError, *parts):
            horovod.broadcast_parameters(given)
        assert given["x"].item() == 1 + peers.rank

    def test_memory_that_is_shared_by_elements_is_refused_where_it_differs(self, peers):
        given = {"t": torch.ones(1).expand(4)}
        horovod.broadcast_parameters(given)
        given = {"t": torch.full((1,), float(peers.rank)).expand(4), "u": np.ones(3)}
        with same_error(peers, StateMismatchError, "t cannot be received into"):
            horovod.broadcast_parameters(given)
        assert given["t"].tolist() == [peers.rank] * 4

    def test_two_of_one_name_are_refused(self, comm):
        pairs = [("a", torch.ones(1)), ("a", torch.ones(2)), ("b", torch.ones(1))]
        with same_error(comm, StageError, "several parameters have one name: a"):
            horovod.broadcast_parameters(pairs)

    def test_what_has_no_plain_form_on_one_rank_is_told_by_all(self, comm):
        value = object() if comm.rank == comm.size - 1 else 1
        with same_error(comm, StageError, "odd is of type builtins.object"):
            horovod.broadcast_parameters({"odd": value})


class TestOptimizerState:
    @pytest.mark.parametrize(
        "make",
        [
            lambda p: torch.optim.AdamW(p, lr=0.1),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
            lambda p: torch.optim.SGD(p, lr=0.1),
            lambda p: torch.optim.LBFGS(p, lr=0.1),
            lambda p: torch.optim.Adagrad(p, lr=0.1),
        ],
        ids=["AdamW", "SGD momentum", "SGD", "LBFGS", "Adagrad"],
    )
    @pytest.mark.parametrize("trained", ["root", "nobody", "all", "all but root"])
    def test_state_and_rates_come_from_root_and_no_step_is_taken(self, comm, make, trained):
        root = comm.size - 1
        net = model(comm.rank)
        optimizer = make(net.parameters())
        has_trained = {
            "root": comm.rank == root,
            "nobody": False,
            "all": True,
            "all but root": comm.rank != root,
        }[trained]
        if has_trained:
            train(net, optimizer)
            optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.5 / (comm.rank + 1)
        weights = [bits(p) for p in net.parameters()]
        horovod.broadcast_optimizer_state(optimizer, root, net)
        assert [bits(p) for p in net.parameters()] == weights
        assert all(p.grad is None for p in net.parameters())
        assert optimizer.param_groups[0]["lr"] == 0.5 / (root + 1)
        assert_same(comm, repr(optimizer.state_dict()))
        horovod.broadcast_parameters(net.named_parameters(), root)
        train(net, optimizer)
        assert_same(comm, [bits(p) for p in net.parameters()])

    def test_equal_ones_are_not_sent(self, peers, reports):
        net = model(0)
        optimizer = torch.optim.Adam(net.parameters())
        train(net, optimizer)
        horovod.broadcast_optimizer_state(optimizer)
        assert reports[-1].bytes_sent == 0

    def test_kinds_that_differ_are_told(self, peers):
        odd = peers.rank == peers.size - 1
        net = model(0)
        kind = torch.optim.SGD if odd else torch.optim.AdamW
        optimizer = kind(net.parameters(), lr=0.1 * (peers.rank + 1))
        last = f"rank {peers.size - 1} of {peers.size}"
        with same_error(peers, StateMismatchError, last, "root has AdamW, this rank SGD"):
            horovod.broadcast_optimizer_state(optimizer)
        assert optimizer.param_groups[0]["lr"] == 0.1 * (peers.rank + 1)

    def test_groups_and_shapes_that_differ_are_told(self, peers):
        def make_optimizer(*shapes):
            groups = [{"params": [torch.nn.Parameter(torch.ones(s))]} for s in shapes]
            return torch.optim.Adam(groups, lr=0.1 * (peers.rank + 1))

        optimizer = make_optimizer(2, 3) if peers.rank == 0 else make_optimizer(2)
        with same_error(peers, StateMismatchError, "root has 2 groups, this rank 1"):
            horovod.broadcast_optimizer_state(optimizer)
        optimizer = make_optimizer(2, 3) if peers.rank == 0 else make_optimizer(2, 4)
        shapes = "group 1: root has parameters of shapes [[3]], this rank [[4]]"
        with same_error(peers, StateMismatchError, shapes):
            horovod.broadcast_optimizer_state(optimizer)
        assert optimizer.param_groups[0]["lr"] == 0.1 * (peers.rank + 1)


class Awkward:
    """Does not come apart, or together again, on some rank."""

    fails = False

    def __reduce__(self):
        return Awkward._make, ()

    @staticmethod
    def _make():
        if Awkward.fails:
            raise ImportError("no such thing here")
        return Awkward()


def large_object():
    shared = torch.arange(10.0)
    read_only = np.arange(4)
    read_only.flags.writeable = False
    return {
        "large": np.arange(5 << 20, dtype=np.float32),
        "small": [np.full(n, n) for n in range(50)],
        "tensors": [torch.ones(3, dtype=torch.bfloat16), torch.empty(0), torch.tensor(7)],
        "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "shared": [shared, shared[2:5], shared.view(5, 2).t()],
        "turned": np.arange(6).reshape(2, 3).T,
        "every other": np.arange(10)[::2],
        "read-only": read_only,
        "text": ["ü", b"bytes", 1 + 2j, {1, 2}, None],
    }


class TestObjects:
    def test_from_every_root_whatever_the_others_have(self, comm):
        for root in range(comm.size):
            given = {"epoch": 7, "a": np.arange(3)} if comm.rank == root else "nothing"
            found = horovod.broadcast_object(given, root, name="state")
            assert found["epoch"] == 7
            assert found["a"].tolist() == [0, 1, 2]
            assert (found is given) == (comm.rank == root)

    def test_arrays_and_tensors_of_all_kinds(self, comm):
        given = large_object()
        found = horovod.broadcast_object(given if comm.rank == 0 else None)
        assert repr(found) == repr(given)
        assert found["large"][-1] == given["large"][-1]
        assert type(found["parameter"]) is torch.nn.Parameter
        assert not found["read-only"].flags.writeable
        for name in ("large", "turned", "every other"):
            found[name][...] = 0  # received where it may be written to
        first, part, turned = found["shared"]
        first[2] = 99
        assert part[0] == 99
        assert turned[0, 1] == 99

    def test_what_is_received_is_nobody_elses_memory(self, comm):
        given = [np.ones(8), np.ones(1 << 16)]
        found = horovod.broadcast_object(given)
        again = horovod.broadcast_object(given)
        if comm.rank:
            found[0][:] = 2
            found[1][:] = 2
            assert again[0].tolist() == [1.0] * 8
            assert (again[1] == 1).all()

    def test_in_place_where_only_contents_differ(self, comm):
        given = {"a": np.full(1 << 16, comm.rank), "t": torch.full((5,), comm.rank)}
        arrays = [given["a"], given["t"]]
        found = horovod.broadcast_object(given, comm.size - 1, in_place=True)
        assert found is given
        assert (arrays[0] == comm.size - 1).all()
        assert arrays[1].tolist() == [comm.size - 1] * 5

    def test_not_in_place_where_more_differs(self, comm):
        given = {"a": np.full(16, comm.rank), "epoch": comm.rank}
        found = horovod.broadcast_object(given, in_place=True)
        assert (found is given) == (comm.rank == 0)
        assert found["a"].tolist() == [0] * 16
        assert given["a"].tolist() == [comm.rank] * 16
        read_only = np.full(4, comm.rank)
        read_only.flags.writeable = False
        assert horovod.broadcast_object(read_only, in_place=True).tolist() == [0] * 4

    def test_objects_of_all_ranks(self, comm):
        given = [comm.rank, "x" * comm.rank, np.full(3, comm.rank)][comm.rank % 3]
        found = horovod.allgather_object(given, name="all")
        expected = [[r, "x" * r, np.full(3, r)][r % 3] for r in range(comm.size)]
        assert repr(found) == repr(expected)

    def test_what_root_cannot_pickle_is_told_by_all(self, comm):
        root = comm.size - 1
        given = (n for n in range(3)) if comm.rank == root else 1
        with same_error(comm, StageError, "broadcasting object 'odd'", f"rank {root} of"):
            horovod.broadcast_object(given, root, name="odd")

    def test_what_one_rank_cannot_unpickle_is_told_by_all(self, peers, monkeypatch):
        last = peers.size - 1
        monkeypatch.setattr(Awkward, "fails", peers.rank == last)
        with same_error(peers, StageError, f"rank {last} of", "no such thing here"):
            horovod.broadcast_object([Awkward(), np.ones(1000)])
        assert horovod.broadcast_object(peers.rank) == 0  # and they go on

    def test_missing_memory_on_one_rank_is_told_by_all(self, peers, monkeypatch):
        def no_room(lengths):
            raise MemoryError(f"{sum(lengths)} bytes")

        last = peers.size - 1
        if peers.rank == last:
            monkeypatch.setattr(object_exchange, "allocate_buffers", no_room)
        with same_error(peers, StageError, f"rank {last} of", "8000 bytes (MemoryError)"):
            horovod.broadcast_object(np.ones(1000))


class TestEveryBroadcast:
    def test_roots_that_differ_or_are_not_there_are_told(self, comm):
        with same_error(comm, OptionsError, f"root_rank is {comm.size}"):
            horovod.broadcast_object(1, root_rank=comm.size)
        with same_error(comm, OptionsError, "root_rank is -1"):
            horovod.broadcast_parameters({}, root_rank=-1)
        if comm.size > 1:
            with same_error(comm, OptionsError, "different root ranks"):
                horovod.broadcast_object(1, root_rank=comm.rank)

    def test_on_a_communicator_of_the_users(self, comm):
        half = comm.Split(comm.rank % 2, -comm.rank)
        found = horovod.broadcast_object(comm.rank, comm=half)
        assert found == max(r for r in range(comm.size) if r % 2 == comm.rank % 2)
        half.Free()

    @pytest.mark.usefixtures("no_leaks")
    def test_many_leave_nothing_behind(self, comm):
        given = {"w": torch.ones(3)}
        for turn in range(60):
            assert horovod.broadcast_object(turn + comm.rank) == turn
            horovod.broadcast_parameters(given)


def test_a_pickle_holds_nothing_large():
    value = large_object()
    packed = pack(value)
    assert len(packed.pickled) < 20_000
    assert sum(packed.lengths) > value["large"].nbytes
