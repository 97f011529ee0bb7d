# SPDX-License-Identifier: Apache-2.0
"""The parts of ranks reach the one that writes them some at a time, whatever fails."""

import tracemalloc

import numpy as np
import pytest

import mpi_ckpt
from mpi_ckpt import ArrayState, PerRankState, RNGState
from mpi_ckpt.engine.sync import parts
from mpi_ckpt.errors import SaveError, StageError
from mpi_ckpt.options import IO
from mpi_ckpt.storage.writing.partial import Partial
from tests.draws import SEED, TIMES
from tests.ranks import RecordingHandle, manager, same_error
from tests.values import alike

DTYPES = [np.int8, np.float16, np.int32, np.float64, np.complex128]


def drawn_value(random):
    """Return a value of arrays of several widths, empty ones too."""
    arrays = [
        random.integers(0, 100, int(random.integers(0, 300))).astype(random.choice(DTYPES))
        for _ in range(random.integers(0, 5))
    ]
    return {"arrays": arrays, "text": "x" * int(random.integers(0, 600))}


def changed(value, random):
    """Return the value with some arrays replaced."""
    arrays = [array + 1 if random.random() < 0.5 else array for array in value["arrays"]]
    return {**value, "arrays": arrays}


@pytest.mark.parametrize("seed", range(4 * TIMES))
@pytest.mark.parametrize("held_bytes", [1, 500, 1 << 20])
def test_any_values_and_any_that_stay_the_same(
    peers, shared_path, monkeypatch, held_bytes, seed
):
    """What an older generation holds is passed over, between leaves that are not."""
    monkeypatch.setattr(parts, "_HELD_BYTES", held_bytes)
    alone = np.random.default_rng([SEED, seed, peers.rank])
    together = np.random.default_rng([SEED, seed, peers.size])
    options = {
        "writers": together.choice(["root", "node", "all"]),
        "asynchronous": bool(together.integers(2)),
        "io": IO(message_bytes=int(together.choice([64, 1 << 20]))),
    }
    states = [PerRankState(name, drawn_value(alone)) for name in "ab"]
    random = RNGState(generators={"own": np.random.default_rng(peers.rank)})
    with manager(shared_path, *states, random, comm=peers, **options) as ours:
        for number in range(3):
            path = ours.save(sync=bool(number % 2)).wait().path
            kept = [state.value for state in states]
            for state in states:
                state.value = None
            ours.restore()
            assert alike([state.value for state in states], kept)
            for state in states:
                state.value = changed(state.value, alone)
    with mpi_ckpt.load(path) as saved:
        assert alike(saved["a"].value()[peers.rank], kept[0])


def test_root_never_holds_all_parts(peers, shared_path, monkeypatch):
    leaf_bytes, leaves = 1 << 20, 6
    monkeypatch.setattr(parts, "_HELD_BYTES", 2 * leaf_bytes)
    arrays = {str(n): np.full(leaf_bytes, peers.rank, np.uint8) for n in range(leaves)}
    state = PerRankState("own", arrays)
    with manager(shared_path, state, comm=peers) as ours:
        ours.save()
        for array in arrays.values():
            array += 1
        tracemalloc.start()
        try:
            ours.save()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < (2 + 1.5) * leaf_bytes


def test_a_sync_leaves_parts_where_they_are(peers, shared_path, monkeypatch):
    own = PerRankState("own", np.full(1 << 20, peers.rank, np.uint8))
    monkeypatch.setattr(PerRankState, "own_value", lambda _: pytest.fail("taken"))
    with (
        manager(shared_path, own, RNGState(), comm=peers) as ours,
        RecordingHandle(ours._session.comm) as handle,
    ):
        ours.sync()
    assert handle.largest < 1000


class Meddler(ArrayState):
    """A state whose capture changes what another state has captured."""

    victim = None

    def capture(self):
        if self.victim is not None:
            self.victim += 1
        return super().capture()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_part_that_changes_during_a_save_fails_it_on_all(peers, shared_path, asynchronous):
    last = peers.size - 1
    own = PerRankState("own", np.full(1000, peers.rank))
    meddler = Meddler("other", {"x": np.zeros(3)})
    with manager(shared_path, own, meddler, comm=peers, asynchronous=asynchronous) as ours:
        if peers.rank == last:
            meddler.victim = own.value
        if peers.size > 1:
            with same_error(peers, StageError, "own", f"rank {last} sent other bytes"):
                ours.save().wait()
        meddler.victim = None
        ours.save().wait()
        assert [info.generation for info in ours.generations()] == [1]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("writers", ["root", "all"])
def test_part_that_cannot_be_read_fails_on_all(
    peers, shared_path, monkeypatch, asynchronous, writers
):
    last = peers.size - 1

    def unreadable(*_):
        raise ValueError("the device is gone")

    state = RNGState()
    options = {"asynchronous": asynchronous, "writers": writers}
    with manager(shared_path, state, comm=peers, **options) as ours:
        with monkeypatch.context() as patch:
            if peers.rank == last:
                patch.setattr(parts, "about_leaf", unreadable)
            if peers.size > 1:
                with same_error(peers, StageError, f"rank {last}", "the device is gone"):
                    ours.save().wait()
        ours.save().wait()
        assert [info.generation for info in ours.generations()] == [1]


@pytest.mark.parametrize("writers", ["root", "all"])
def test_root_that_cannot_begin_takes_what_the_others_send(
    peers, shared_path, monkeypatch, writers
):
    states = PerRankState("own", np.full(100_000, peers.rank)), RNGState()

    def full(*_):
        raise OSError(28, "No space left on device")

    with manager(shared_path, *states, comm=peers, writers=writers) as ours:
        with monkeypatch.context() as patch:
            patch.setattr(Partial, "require_space", full)
            with same_error(peers, SaveError, "No space left"):
                ours.save()
        ours.save()
        states[0].value = None
        ours.restore()
    assert (states[0].value == peers.rank).all()
