# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt import digest
from mpi_ckpt.digest import BlockHasher, Digest, copy_many, digest_bytes, digest_many


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
def test_many_digests_come_in_order_on_any_number_of_threads(monkeypatch, threads):
    monkeypatch.setattr(digest, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(digest, "_GROUP_BYTES", 200)
    runs = [bytes([i]) * (i * 7) for i in range(20)]
    workers = set()

    def reading(run):
        def read():
            workers.add(threading.current_thread())
            return memoryview(run)

        return read

    found = digest_many([reading(run) for run in runs], [len(run) for run in runs], threads)
    assert found == [Digest.of(run) for run in runs]
    assert (threading.main_thread() in workers) == (threads == 1)


def test_few_bytes_start_no_thread():
    seen = []

    def read():
        seen.append(threading.current_thread())
        return memoryview(b"few")

    digest_many([read], [3], threads=4)
    assert seen == [threading.main_thread()]


def test_failure_of_a_read_is_raised(monkeypatch):
    monkeypatch.setattr(digest, "_PARALLEL_BYTES", 0)

    def read():
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        digest_many([read], [1], threads=2)


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
