# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.leaves import digest
from mpi_ckpt.leaves.buckets import plan_buckets
from mpi_ckpt.leaves.digest import (
    BlockHasher,
    Digest,
    Digests,
    copy_many,
    digest_bytes,
    digest_many,
)


@given(
    pieces=st.lists(st.binary(max_size=40), max_size=8),
    block_bytes=st.integers(1, 30),
)
def test_stream_of_any_pieces_has_the_digest_of_the_whole(pieces, block_bytes):
    hasher = BlockHasher(block_bytes)
    for piece in pieces:
        hasher.update(piece)
    whole = b"".join(pieces)
    assert hasher.nbytes == len(whole)
    assert hasher.finish() == Digest.of(whole, block_bytes)


@given(st.binary(max_size=200), st.integers(1, 64))
def test_blocks_cover_the_run_and_nothing_is_one_block(data, block_bytes):
    blocks = Digest.of(data, block_bytes).blocks
    assert len(blocks) == max(1, -(-len(data) // block_bytes))
    cuts = range(0, max(len(data), 1), block_bytes)
    assert blocks == tuple(digest_bytes(data[c : c + block_bytes]) for c in cuts)


def test_digest_is_the_canonical_xxh3_128():
    assert digest_bytes(b"abc") == xxhash.xxh3_128(b"abc").digest()
    assert digest_bytes(b"").hex() == "99aa06d3014798d86001c324468d497f"


def test_whole_of_one_block_is_its_digest_and_of_many_the_digest_of_digests():
    digest = Digest.of(b"abcd", 4)
    two = Digest.of(b"abcde", 4)
    assert digest.whole == digest_bytes(b"abcd")
    assert two.whole == digest_bytes(digest_bytes(b"abcd") + digest_bytes(b"e"))


def test_views_of_any_format_are_digested_as_bytes():
    view = memoryview(bytes(range(16)))
    assert Digest.of(view.cast("d")) == Digest.of(bytes(view))
    hasher = BlockHasher()
    hasher.update(view.cast("i"))
    assert hasher.finish() == Digest.of(bytes(view))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("small", [0, 50, 200])
def test_many_digests_come_in_order_on_any_number_of_threads(monkeypatch, threads, small):
    monkeypatch.setattr(digest, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(digest, "_SMALL_BYTES", small)
    monkeypatch.setattr(digest, "_GROUP_BYTES", 200)
    runs = [bytes([i]) * (i * 7) for i in range(20)]
    workers = set()

    def read(first, last):
        workers.add(threading.current_thread())
        return [memoryview(run) for run in runs[first:last]]

    found = digest_many(read, np.array([len(run) for run in runs]), threads, 64)
    assert list(found) == [Digest.of(run, 64) for run in runs]
    assert (workers == {threading.main_thread()}) == (threads == 1)


def test_few_bytes_start_no_thread():
    seen = []

    def read(_first, _last):
        seen.append(threading.current_thread())
        return [memoryview(b"few")]

    digest_many(read, np.array([3]), threads=4)
    assert seen == [threading.main_thread()]


def test_failure_of_a_read_is_raised(monkeypatch):
    monkeypatch.setattr(digest, "_PARALLEL_BYTES", 0)

    def read(_first, _last):
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        digest_many(read, np.array([1]), threads=2)


RUNS = st.lists(st.binary(max_size=9), max_size=8)


@given(RUNS, st.data())
def test_columns_of_digests_are_the_digests(runs, data):
    digests = [Digest.of(run, 4) for run in runs]
    columns = Digests.of(digests)
    assert list(columns) == digests
    assert [columns[n] for n in range(len(runs))] == digests
    numbers = data.draw(st.lists(st.sampled_from(range(len(runs))))) if runs else []
    assert list(columns.pick(numbers)) == [digests[n] for n in numbers]
    cut = data.draw(st.integers(0, len(runs)))
    assert list(columns[:cut]) == digests[:cut]
    assert Digests.joined([columns[:cut], columns[cut:]]) == columns
    assert columns.wholes == b"".join(one.whole for one in digests)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(0, 20), st.integers(20, 60))
def test_buckets_hold_all_runs_in_order_and_large_ones_alone(sizes, small, most):
    buckets = plan_buckets(np.array(sizes, np.int64), small, most)
    assert [n for first, last in buckets for n in range(first, last)] == [
        *range(len(sizes))
    ]
    for first, last in buckets:
        assert last > first
        if last - first > 1:
            assert max(sizes[first:last]) <= small
            assert sum(sizes[first:last]) <= most
    for (first, middle), (_, last) in pairwise(buckets):
        fused = sizes[first:last]
        assert max(fused) > small or sum(sizes[first : middle + 1]) > most


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("digested", [True, False])
@given(sizes=st.lists(st.integers(0, 50), max_size=8), seed=st.integers(0, 99))
def test_copies_are_equal_and_have_the_digests_of_their_sources(
    threads, digested, sizes, seed
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "BLOCK_BYTES", 17)
        patch.setattr(digest, "_CACHED_BYTES", 5)
        patch.setattr(digest, "_PARALLEL_BYTES", 1)
        patch.setattr(digest, "_GROUP_BYTES", 20)
        sources = [
            bytes((seed + i + n) % 256 for n in range(size)) for i, size in enumerate(sizes)
        ]
        places = [bytearray(size) for size in sizes]
        copies = [
            (memoryview(a), memoryview(b)) for a, b in zip(sources, places, strict=True)
        ]
        found = copy_many(copies, threads, digested=digested)
    assert [bytes(place) for place in places] == sources
    expected = [Digest.of(source, 17) for source in sources]
    assert found == (expected if digested else [])
