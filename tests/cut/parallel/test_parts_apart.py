# SPDX-License-Identifier: Apache-2.0
"""With several writers each rank's value goes into its own file, and never to root."""

from itertools import chain

import numpy as np
import pytest

import mpi_ckpt
from mpi_ckpt import Accumulator, ArrayState, PerRankState, RNGState, ShardedArrayState
from mpi_ckpt.elastic import Memory
from mpi_ckpt.errors import RestoreError, StageError
from mpi_ckpt.options import IO
from mpi_ckpt.storage.reading.reader import read_manifest
from tests.cut import cuts
from tests.ranks import RecordingHandle, manager, same_error
from tests.restore.parallel.test_fallback import flip
from tests.values import alike

WRITERS = pytest.mark.parametrize("writers", ["node", "all"])
WHOLE = cuts.whole_array((12, 7, 3))


def value_of(rank, nbytes=8000):
    """Return values of different forms on different ranks."""
    forms = [
        {"rank": rank, "cache": np.full((2, nbytes // 16), float(rank))},
        np.arange(nbytes // 2, dtype=np.int16) + rank,
        (rank, b"x" * nbytes, np.zeros((0, 3)), "text"),
        None,
    ]
    return forms[rank % 4]


def tile_files(path):
    return sorted(file.name for file in path.glob("tiles-*"))


@pytest.fixture
def fewer(peers):
    """All ranks but the last, as a communicator; on that one, it alone."""
    part = peers.Split(int(peers.rank == peers.size - 1), peers.rank)
    yield part
    part.Free()


@WRITERS
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("sync", [True, False])
def test_each_rank_gets_its_own_value_back(peers, shared_path, writers, asynchronous, sync):
    state = PerRankState("own", value_of(peers.rank))
    with manager(
        shared_path, state, comm=peers, writers=writers, asynchronous=asynchronous
    ) as ours:
        path = ours.save(sync=sync).wait().path
        state.value = "later"
        ours.restore()
    assert alike(state.value, value_of(peers.rank))
    assert read_manifest(path).state("own").leaves == ()
    per_host = writers == "node" and not asynchronous
    assert len(tile_files(path)) == (1 if per_host else peers.size)
    with mpi_ckpt.load(path) as saved:
        values = saved["own"].value()
    assert alike(values, [value_of(rank) for rank in range(peers.size)])


def test_each_host_writes_the_values_of_its_ranks(peers, shared_path, on_hosts):
    on_hosts("abab")
    state = PerRankState("own", value_of(peers.rank))
    with manager(shared_path, state, comm=peers, writers="node") as ours:
        path = ours.save().path
        state.value = "later"
        ours.restore()
    assert alike(state.value, value_of(peers.rank))
    assert len(tile_files(path)) == min(2, peers.size)


def test_values_do_not_go_through_root(peers, shared_path):
    nbytes = 1 << 20
    state = PerRankState("own", np.full(nbytes, peers.rank, np.uint8))
    with manager(shared_path, state, comm=peers, writers="all") as ours:
        with RecordingHandle(ours._session.comm) as handle:
            ours.save()
            state.value = None
            ours.restore()
        assert handle.largest < nbytes // 10
        assert (state.value == peers.rank).all()


@WRITERS
def test_fewer_ranks_and_a_function_that_shares_out(peers, fewer, shared_path, writers):
    own, seen = PerRankState("own", value_of(peers.rank)), [peers.rank, 10 + peers.rank]
    states = own, PerRankState("seen", seen)
    with manager(shared_path, *states, comm=peers, writers=writers) as ours:
        ours.save()
    if peers.rank == peers.size - 1:
        return
    again = PerRankState("own")
    shared = PerRankState("seen", resize=lambda values, size: [[*chain(*values)]] * size)
    with manager(shared_path, again, shared, comm=fewer) as ours:
        ours.restore()
    assert alike(again.value, value_of(peers.rank))
    assert shared.value == [n for rank in range(peers.size) for n in (rank, 10 + rank)]


@pytest.mark.parametrize("window_bytes", [1, 3000, 1 << 20])
def test_one_writer_before_and_after(peers, shared_path, window_bytes):
    """The two ways of saving are read alike, in either order, whatever the window."""
    state = PerRankState("own", value_of(peers.rank))
    io = IO(window_bytes=window_bytes, message_bytes=100)
    for number, writers in enumerate(["root", "all", "root"]):
        with manager(shared_path, state, comm=peers, writers=writers, io=io) as ours:
            if number:
                state.value = None
                ours.restore()
                assert alike(state.value, value_of(peers.rank))
            path = ours.save().path
        assert bool(tile_files(path)) == bool(read_manifest(path).state("own").cut)
        assert bool(tile_files(path)) == (writers == "all")


@WRITERS
def test_beside_states_of_all_other_kinds(peers, shared_path, writers):
    boxes = cuts.columns(WHOLE.shape, peers.size)[peers.rank]

    def states(*, filled):
        sums = Accumulator()
        if filled:
            sums["seen"] += peers.rank + 1
        return [
            PerRankState("own", value_of(peers.rank) if filled else None),
            RNGState(),
            ShardedArrayState("field", {"x": cuts.blocks(WHOLE, boxes, filled=filled)}),
            ArrayState("all", {"y": np.full(50, float(filled))}),
            sums,
        ]

    with manager(shared_path, *states(filled=True), comm=peers, writers=writers) as ours:
        ours.save()
    own, _, field, arrays, sums = again = states(filled=False)
    with manager(shared_path, *again, comm=peers) as ours:
        ours.restore()
        with sums.synchronized():
            assert sums["seen"] == peers.size * (peers.size + 1) // 2
    assert alike(own.value, value_of(peers.rank))
    for block in field.blocks["x"]:
        want = WHOLE[cuts.box_slices(block.offset, block.array.shape)]
        assert block.array.tobytes() == want.tobytes()
    assert (arrays.capture().leaves[0].buffer.read()[:8]) == np.float64(1).tobytes()


@pytest.mark.parametrize("fault", ["flipped", "missing"])
def test_damaged_part_of_any_rank_makes_all_fall_back(peers, shared_path, fault):
    state = PerRankState("own")
    with manager(shared_path, state, comm=peers, writers="all") as ours:
        for number in (1, 2):
            state.value = np.full(1000, 10 * number + peers.rank)
            path = ours.save().path
        if peers.rank == 0:
            last = path / tile_files(path)[-1]
            flip(last, -1) if fault == "flipped" else last.unlink()
        peers.Barrier()
        report = ours.restore()
    assert report.generation == 1
    assert list(report.quarantined)
    assert (state.value == 10 + peers.rank).all()


def test_value_that_cannot_be_saved_fails_on_all(peers, shared_path):
    last = peers.size - 1
    state = PerRankState("own", object() if peers.rank == last else 1)
    with manager(shared_path, state, comm=peers, writers="all") as ours:
        with same_error(peers, StageError, "own", f"rank {last}", "no safe form"):
            ours.save()
        state.value = peers.rank
        ours.save()
        ours.restore()
    assert state.value == peers.rank


def test_unchanged_value_of_a_rank_is_shared_with_the_last_save(peers, shared_path):
    state = PerRankState("own", np.full(10_000, float(peers.rank)))
    with manager(shared_path, state, comm=peers, writers="all") as ours:
        ours.save()
        if peers.rank == 0:
            state.value = np.zeros(10_000) - 1
        second = ours.save()
        state.value = None
        ours.restore()
    assert second.bytes_reused >= (peers.size - 1) * 80_000
    assert (state.value == (peers.rank or -1)).all()


def test_copies_in_memory_have_the_values_of_all_ranks(peers, shared_path):
    memory = Memory()
    state = PerRankState("own", value_of(peers.rank))
    arguments = {"options": mpi_ckpt.Options(writers="all", preemption_signals=())}
    with mpi_ckpt.CheckpointManager(
        shared_path, [state], comm=peers, memory=memory, **arguments
    ) as ours:
        ours.save()
        state.value = None
        assert ours.restore().from_memory
    assert alike(state.value, value_of(peers.rank))


def test_resize_that_fails_fails_on_all_and_changes_nothing(peers, fewer, shared_path):
    state = PerRankState("own", 1)
    with manager(shared_path, state, comm=peers, writers="all") as ours:
        ours.save()
    if peers.rank < peers.size - 1:
        state = PerRankState("own", "mine", resize=lambda values, _: values[:0])
        with (
            manager(shared_path, state, comm=fewer) as ours,
            same_error(fewer, RestoreError, "own", "returned"),
        ):
            ours.restore()
        assert state.value == "mine"
