# SPDX-License-Identifier: Apache-2.0
"""What differs between ranks by nature: each gets its own back, nothing of the others."""

from types import SimpleNamespace

import numpy as np
import pytest

from mpi_ckpt import ArrayState, ObjectState, PerRankState, RNGState
from mpi_ckpt.comm import deal_out
from mpi_ckpt.errors import RestoreError, StateMismatchError
from mpi_ckpt.options import IO
from mpi_ckpt.states.packed import pack
from tests.making import joined, use_blocks_of
from tests.ranks import RecordingHandle, assert_same, manager, randoms, same_error
from tests.restore.parallel.test_fallback import flip

SHARD = "rank-00000.safetensors"


def value_of(rank):
    return {"rank": rank, "seen": list(range(rank)), "cache": np.full(rank + 1, rank)}


def is_value_of(rank, value):
    return (
        (value["rank"], value["seen"]) == (rank, list(range(rank)))
        and value["cache"].tolist() == [rank] * (rank + 1)
    )  # fmt: skip


def scatter(communicator, parts, *, broken_at=None, window_bytes=1000):
    """Deal out parts, last rank first; fail instead of dealing to one rank."""

    def deal():
        for rank in reversed(range(communicator.size)):
            if rank == broken_at:
                raise OSError("the disk is gone")
            yield [rank], parts[rank]

    return deal_out(
        communicator,
        deal(),
        "dealing",
        error=RestoreError,
        window_bytes=window_bytes,
    )


@pytest.mark.parametrize("message_bytes", [64, 1 << 20])
@pytest.mark.parametrize("window_bytes", [1, 1000, 1 << 20])
def test_each_rank_gets_its_own_bytes(make_communicator, message_bytes, window_bytes):
    communicator = make_communicator(message_bytes=message_bytes)
    stream = randoms(window_bytes)
    lengths = [0, 1, 64, 65, 5000]
    for turn in range(len(lengths)):
        parts = [
            stream.randbytes(lengths[(rank + turn) % len(lengths)])
            for rank in range(communicator.size)
        ]
        with RecordingHandle(communicator) as handle:
            mine = scatter(communicator, parts, window_bytes=window_bytes)
        assert mine == parts[communicator.rank]
        assert handle.largest <= max(message_bytes, 56)
        if not communicator.is_root:
            # And their number, its own, and those of ranks and bytes.
            assert handle.sent_by("Irecv") == len(mine) + 8 + 24


@pytest.mark.parametrize("message_bytes", [64, 1 << 20])
def test_failure_in_the_midst_reaches_all_and_leaves_nothing_behind(
    make_communicator, message_bytes
):
    communicator = make_communicator(message_bytes=message_bytes)
    parts = [bytes([rank]) * 200 for rank in range(communicator.size)]
    for broken_at in range(communicator.size):
        with same_error(communicator.handle, RestoreError, "disk is gone", "dealing"):
            scatter(communicator, parts, broken_at=broken_at)
        assert scatter(communicator, parts) == parts[communicator.rank]


def test_every_rank_gets_its_own_value_back(comm, shared_path):
    state = PerRankState("position", value_of(comm.rank))
    with manager(shared_path, state) as checkpoints:
        report = checkpoints.save()
        state.value = None
        checkpoints.restore()
    assert report.sync.differing == {}
    assert is_value_of(comm.rank, state.value)


def test_what_a_rank_receives_does_not_grow_with_the_ranks(peers, shared_path):
    states = PerRankState("cache", bytes([peers.rank]) * 10_000), RNGState()
    with manager(shared_path, *states) as checkpoints:
        checkpoints.save()
        own = sum(len(pack(state.own_value())) for state in states)
        communicator = checkpoints._session.comm
        with RecordingHandle(communicator) as handle:
            checkpoints.restore()
    if peers.rank:
        received = handle.sent_by("Irecv") + handle.sent_by("Ibcast")
        assert own <= received < own + 3000  # and what is told of the generation


@pytest.fixture
def fewer(peers):
    """All ranks but the last, as a communicator; on that one, it alone."""
    part = peers.Split(int(peers.rank == peers.size - 1), peers.rank)
    yield part
    part.Free()


def test_fewer_ranks_take_the_values_of_the_first(peers, fewer, shared_path, caplog):
    with manager(shared_path, PerRankState("p", value_of(peers.rank))) as checkpoints:
        checkpoints.save()
    if peers.rank < peers.size - 1:
        state = PerRankState("p")
        with manager(shared_path, state, comm=fewer) as checkpoints:
            checkpoints.restore()
        assert is_value_of(peers.rank, state.value)
        told = [message for message in caplog.messages if "go to no rank" in message]
        assert len(told) == (peers.rank == 0)
        assert all(f" of saved rank {peers.size - 1} go to" in message for message in told)


def test_more_ranks_keep_what_they_have(peers, fewer, shared_path):
    if peers.rank < peers.size - 1:
        with manager(shared_path, PerRankState("p", value_of(peers.rank)), comm=fewer) as m:
            m.save()
    peers.Barrier()
    state = PerRankState("p", "as made")
    with manager(shared_path, state) as checkpoints:
        checkpoints.restore()
    if peers.rank < peers.size - 1:
        assert is_value_of(peers.rank, state.value)
    else:
        assert state.value == "as made"


def share_out(values, size):
    """Deal the seen samples of all saved ranks out to other ranks."""
    seen = [sample for value in values for sample in value]
    return [seen[rank::size] for rank in range(size)]


@pytest.mark.parametrize("yields", [False, True])
def test_resize_makes_the_values_of_another_number_of_ranks(
    peers, fewer, shared_path, yields
):
    calls = []

    def returning(values, size):
        calls.append(len(values))
        return share_out(values, size)

    def yielding(values, size):
        calls.append(len(values))
        yield from share_out(values, size)

    resize = yielding if yields else returning

    mine = [10 * peers.rank, 10 * peers.rank + 1]
    with manager(shared_path, PerRankState("seen", mine, resize=resize)) as checkpoints:
        checkpoints.save()
        checkpoints.restore()
    assert calls == []  # the same number: each its own
    if peers.rank < peers.size - 1:
        state = PerRankState("seen", resize=resize)
        with manager(shared_path, state, comm=fewer) as checkpoints:
            checkpoints.restore()
        everything = [10 * rank + more for rank in range(peers.size) for more in (0, 1)]
        assert state.value == everything[peers.rank :: fewer.size]
        assert calls == ([peers.size] if peers.rank == 0 else [])


def lose_one(values, size):
    return share_out(values, size)[1:]


def fail(values, size):
    raise ZeroDivisionError("of the user")


def yield_one(values, size):
    yield values[0]
    if size == 1:
        yield values[-1]


def fail_late(values, size):
    yield values[0]
    raise ZeroDivisionError("of the user")


@pytest.mark.parametrize(
    ("resize", "text"),
    [
        (lose_one, "returned"),
        (fail, "of the user"),
        (yield_one, "returned"),
        (fail_late, "of the user"),
    ],
)
def test_resize_that_fails_fails_on_all_and_changes_nothing(
    peers, fewer, shared_path, resize, text
):
    arrays = {"x": np.ones(10)}
    with manager(
        shared_path, ArrayState("a", arrays), PerRankState("seen", [1])
    ) as checkpoints:
        checkpoints.save()
    arrays["x"][:] = 5
    if peers.rank < peers.size - 1:
        state = PerRankState("seen", "mine", resize=resize)
        with (
            manager(shared_path, ArrayState("a", arrays), state, comm=fewer) as checkpoints,
            same_error(fewer, RestoreError, "seen", text),
        ):
            checkpoints.restore()
        assert state.value == "mine"
        assert (arrays["x"] == 5).all()


def test_damaged_part_of_any_rank_makes_all_fall_back(comm, shared_path):
    arrays = {"x": np.zeros(10)}
    state = PerRankState("p")
    with manager(shared_path, ArrayState("a", arrays), state) as checkpoints:
        for number in (1, 2):
            state.value = b"%d %d" % (number, comm.rank) * 100
            arrays["x"][:] = number
            path = checkpoints.save().path
        state.value = None
        if comm.rank == 0:
            flip(path / SHARD, -1)  # in the part of the last rank
        comm.Barrier()
        report = checkpoints.restore()
    assert report.generation == 1
    assert list(report.quarantined)
    assert state.value == b"1 %d" % comm.rank * 100
    assert (arrays["x"] == 1).all()


@pytest.mark.parametrize("window_bytes", [1, 3000])
def test_parts_larger_than_the_window_and_than_a_block(
    comm, shared_path, window_bytes, monkeypatch
):
    use_blocks_of(512, monkeypatch)
    mine = randoms(comm.rank).randbytes(100 + 2000 * comm.rank)
    state = PerRankState("p", mine)
    with manager(
        shared_path, state, io=IO(window_bytes=window_bytes, message_bytes=100)
    ) as checkpoints:
        checkpoints.save()
        state.value = None
        checkpoints.restore()
    assert state.value == mine


def test_states_of_other_kinds_are_a_mismatch_on_all(comm, shared_path):
    with manager(shared_path, PerRankState("s", 1), ObjectState("o", 2)) as checkpoints:
        checkpoints.save()
    for states in (
        (RNGState("s"), ObjectState("o")),
        (ObjectState("s"), ObjectState("o")),
        (PerRankState("s"), PerRankState("o")),
    ):
        with (
            manager(shared_path, *states) as checkpoints,
            same_error(comm, StateMismatchError),
        ):
            checkpoints.restore()


def test_asynchronous_save_has_the_values_of_its_moment(comm, shared_path):
    state = PerRankState("p", [comm.rank])
    with manager(shared_path, state, asynchronous=True) as checkpoints:
        pending = checkpoints.save()
        state.value.append("later")
        pending.wait()
        checkpoints.restore()
    assert state.value == [comm.rank]


def test_all_write_and_all_read(comm, shared_path):
    arrays = {f"{n}": np.full(100, n) for n in range(8)}
    state = PerRankState("p", comm.rank)
    options = {"writers": "all", "io": IO(readers="all")}
    with manager(shared_path, ArrayState("a", arrays), state, **options) as checkpoints:
        checkpoints.save()
        state.value = None
        checkpoints.restore()
    assert state.value == comm.rank
    assert_same(comm, sorted(arrays))


def test_contents_go_through_a_file_object(comm, tmp_path):
    """As `State.save` and `load` do it, without a manager."""
    saved = PerRankState("p", resize=share_out)
    joined(saved, [[10 * n, 10 * n + 1] for n in range(2)])
    with open(tmp_path / "file", "w+b") as file:
        saved.save(file)
        for size in (1, 3):
            values = []
            for rank in range(size):
                state = PerRankState("p", resize=share_out)
                state.bind(SimpleNamespace(rank=rank, size=size))
                file.seek(0)
                state.load(file)
                values.append(state.value)
            assert values == [[0, 1, 10, 11][rank::size] for rank in range(size)]


def test_callback_is_told_of_another_number_of_ranks(peers, fewer, shared_path):
    arrays = {"x": np.ones(3)}
    calls = []

    def note(old, new):
        calls.append((old, new, arrays["x"][0]))

    with manager(shared_path, ArrayState("a", arrays)) as checkpoints:
        assert checkpoints.restore(on_resize=note) is None
        checkpoints.save(step=7)
        arrays["x"][:] = 0
        checkpoints.restore(on_resize=note)
        assert calls == []  # as many as saved
    arrays["x"][:] = 0
    if peers.rank < peers.size - 1:
        with manager(shared_path, ArrayState("a", arrays), comm=fewer) as checkpoints:
            checkpoints.restore()
            checkpoints.restore(["a"], on_resize=note)
        assert calls == [(peers.size, fewer.size, 1.0)]  # with the restored state


def test_callback_that_fails_on_one_rank_fails_on_all(peers, fewer, shared_path):
    state = ArrayState("a", {"x": np.zeros(3)})
    with manager(shared_path, state) as checkpoints:
        checkpoints.save(step=7)

    def break_on_root(old, new):
        if peers.rank == 0:
            raise ZeroDivisionError(f"{old} to {new}")

    if peers.rank < peers.size - 1:
        with manager(shared_path, state, comm=fewer) as checkpoints:
            text = f"{peers.size} to {fewer.size}"
            with same_error(fewer, RestoreError, "on_resize", text, "rank 0"):
                checkpoints.restore(on_resize=break_on_root)
            assert checkpoints.steps == 7
            checkpoints.restore()
