# SPDX-License-Identifier: Apache-2.0
"""Rows of any number on each rank: dealt out evenly, or to the ranks that a route names."""

from itertools import product

import numpy as np
import pytest

from mpi_ckpt import ConcatState
from mpi_ckpt.errors import RestoreError
from mpi_ckpt.options import IO
from tests.cut.parallel.test_any_cut import on_first, pairs
from tests.ranks import manager, randoms, same_error

ROWS = 23
RECORD = np.dtype([("id", "i4"), ("mass", "f4"), ("kind", "u1")])


def columns(rows):
    """Return columns of some rows of the whole."""
    at = np.asarray(rows)
    return {
        "number": at.astype(np.int64),
        "position": np.stack([at, at * 0.5, -at], axis=1).astype(np.float32).reshape(-1, 3),
        "record": np.rec.fromarrays(
            [at, at * 2.0, at % 7], dtype=RECORD
        ).view(np.ndarray).view(RECORD),
        "nothing": np.zeros((len(at), 0)),
    }  # fmt: skip


def shares(size, seed):
    """Return how many rows each rank has, drawn: some have none."""
    random = randoms(seed)
    cuts = sorted(
        random.choice([0, ROWS, random.randint(0, ROWS)]) for _ in range(size - 1)
    )
    return [range(a, b) for a, b in zip([0, *cuts], [*cuts, ROWS], strict=True)]


def save(comm, root, size, *, seed=0):
    def work(part):
        state = ConcatState("rows", columns(list(shares(size, seed)[part.rank])))
        with manager(root, state, comm=part) as ours:
            ours.save(step=1)

    on_first(comm, size, work)


def restore(comm, root, size, *, route=None, **io):
    def work(part):
        state = ConcatState("rows", columns([]), route=route and route(part))
        with manager(root, state, comm=part, io=IO(**io)) as ours:
            ours.restore()
        return state.arrays, part.allgather(len(state.arrays["number"]))

    return on_first(comm, size, work)


def holds(found, rows):
    for key, column in columns(list(rows)).items():
        assert found[key].tobytes() == column.tobytes(), key
        assert found[key].shape == column.shape


@pytest.mark.parametrize("seed", range(3))
def test_rows_come_back_in_even_shares(peers, shared_path, seed):
    for n, m in pairs(peers):
        root = shared_path / f"{n}-{m}"
        save(peers, root, n, seed=seed)
        found = restore(peers, root, m)
        if found is not None:
            holds(found[0], range(ROWS * peers.rank // m, ROWS * (peers.rank + 1) // m))


@pytest.mark.parametrize("window_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("few", [False, True], ids=["all ranks", "last rank"])
def test_rows_go_where_the_route_sends_them(peers, shared_path, window_bytes, few):
    def rank_of(number, size):
        return np.full(len(number), size - 1) if few else number * 7 % size

    def route(part):
        return lambda chunk: rank_of(chunk["number"], part.size)

    for n, m in product({1, peers.size}, {1, peers.size}):
        root = shared_path / f"{n}-{m}"
        save(peers, root, n)
        found = restore(peers, root, m, route=route, window_bytes=window_bytes)
        if found is not None:
            every = np.arange(ROWS)
            holds(found[0], every[rank_of(every, m) == peers.rank])
            assert sum(found[1]) == ROWS


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (lambda chunk: chunk["number"] // 0 + None, "route()"),
        (lambda chunk: chunk["number"] * 0 + 99, "to rank 99"),
        (lambda chunk: chunk["number"] * 0 - 1, "to rank -1"),
        (lambda chunk: chunk["number"] * 0.5, "float64"),
        (lambda chunk: chunk["number"][:-1], "expected an integer for each"),
    ],
    ids=["raises", "beyond", "negative", "no integer", "too few"],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_wrong_route_is_an_error_on_all_ranks(peers, shared_path, wrong, part):
    save(peers, shared_path, peers.size)
    last = peers.rank == peers.size - 1
    fine = lambda chunk: chunk["number"] * 0  # noqa: E731
    state = ConcatState("rows", columns([]), route=wrong if last else fine)
    ours = manager(shared_path, state, comm=peers)
    with same_error(peers, RestoreError, "rows", part):
        ours.restore()
    ours.close()
