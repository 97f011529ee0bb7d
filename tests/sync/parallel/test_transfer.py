# SPDX-License-Identifier: Apache-2.0
"""Buffers of any size between ranks, in messages of a bounded size."""

import math

import numpy as np
import pytest

from mpi_ckpt.comm import (
    bcast_buffers,
    bcast_bytes,
    bcast_json,
    compare_texts,
    differing_digests,
    exchange_counts,
    gather_bytes,
    mean_buffers,
)
from mpi_ckpt.comm.rank_tree import gather_findings, scatter_bytes
from mpi_ckpt.leaves.digest import digest_bytes
from tests.ranks import RecordingHandle, assert_same, randoms

SIZES = [
    0,
    1,
    63,
    64,
    65,
    124,
    125,
    126,
    511,
    512,
    513,
    999,
    1000,
    1001,
    4096,
    4097,
    20_000,
]


def check_bcast(communicator, contents):
    if communicator.is_root:
        buffers = [memoryview(content) for content in contents]  # read-only
    else:
        buffers = [memoryview(bytearray(len(content))) for content in contents]
    bcast_buffers(communicator, buffers, "testing")
    assert [bytes(buffer) for buffer in buffers] == contents


@pytest.mark.parametrize("message_bytes", [64, 1000, 4096])
@pytest.mark.parametrize("count", [0, 1, 2, 17, 80])
def test_bcast_buffers_of_mixed_sizes(make_communicator, message_bytes, count):
    communicator = make_communicator(message_bytes=message_bytes)
    stream = randoms(count)
    contents = [stream.randbytes(stream.choice(SIZES)) for _ in range(count)]
    with RecordingHandle(communicator) as handle:
        check_bcast(communicator, contents)
    assert handle.largest <= message_bytes
    expected = sum(map(len, contents)) if communicator.size > 1 else 0
    assert handle.sent_by("Ibcast") == expected


def test_bcast_buffers_of_random_shapes(make_communicator):
    stream = randoms("shapes")
    communicator = make_communicator()
    for _ in range(60):
        communicator.message_bytes = stream.randint(64, 5000)
        contents = [
            stream.randbytes(
                int(stream.expovariate(1 / 700)) if stream.random() < 0.9 else 0
            )
            for _ in range(stream.randint(0, 40))
        ]
        with RecordingHandle(communicator) as handle:
            check_bcast(communicator, contents)
        assert handle.largest <= communicator.message_bytes


def test_bcast_leaves_neighbouring_bytes_alone(make_communicator):
    communicator = make_communicator(message_bytes=64)
    memory = bytearray(b"#" * 1000)
    middle = memoryview(memory)[100:900]
    if communicator.is_root:
        middle[:] = b"x" * 800
    bcast_buffers(communicator, [middle[:5], middle[5:700], middle[700:]], "testing")
    assert bytes(memory) == b"#" * 100 + b"x" * 800 + b"#" * 100


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 100_001])
def test_bcast_bytes(make_communicator, length):
    communicator = make_communicator(message_bytes=1000)
    content = randoms(length).randbytes(length)
    mine = content if communicator.is_root else None
    with RecordingHandle(communicator) as handle:
        assert bcast_bytes(communicator, mine, "testing") == content
    assert handle.largest <= 1000


def test_bcast_bytes_ignores_what_others_give(make_communicator):
    communicator = make_communicator()
    assert bcast_bytes(communicator, b"%d" % communicator.rank, "testing") == b"0"


def test_bcast_json(make_communicator):
    communicator = make_communicator(message_bytes=64)
    value = {"text": "größe \N{SNOWMAN} \ud800", "list": [1, None, 2.5, {}], "n": 10**30}
    mine = value if communicator.is_root else object()
    assert bcast_json(communicator, mine, "testing") == value
    not_finite = [math.inf, -math.inf] if communicator.is_root else None
    assert bcast_json(communicator, not_finite, "testing") == [math.inf, -math.inf]


@pytest.mark.parametrize("message_bytes", [64, 1000])
def test_gather_bytes_of_other_lengths(make_communicator, message_bytes):
    communicator = make_communicator(message_bytes=message_bytes)
    parts = [randoms(rank).randbytes(rank * 1777) for rank in range(communicator.size)]
    for turn in (parts, parts[::-1]):
        with RecordingHandle(communicator) as handle:
            gathered = gather_bytes(communicator, turn[communicator.rank], "testing")
        assert gathered == (turn if communicator.is_root else [])
        assert handle.largest <= message_bytes


@pytest.mark.parametrize("length", [3, 40_000])
def test_root_may_be_any_rank(make_communicator, length):
    communicator = make_communicator()
    size, rank = communicator.size, communicator.rank
    parts = [randoms(of).randbytes(length + of) for of in range(size)]
    for communicator.root in range(size):
        gathered = gather_bytes(communicator, parts[rank], "testing")
        assert gathered == (parts if communicator.is_root else [])
        given = parts if communicator.is_root else ()
        mine = scatter_bytes(communicator, given, "testing", window_bytes=1 << 16)
        assert mine == parts[rank]
        found = gather_findings(communicator, b"%d" % (rank % 2), str(rank), "testing")
        expected = [(str(n), list(range(n, size, 2))) for n in range(min(size, 2))]
        assert found == (expected if communicator.is_root else [])


@pytest.mark.parametrize("message_bytes", [64, 1 << 20])
@pytest.mark.parametrize("many", [0, 1, 3])
def test_counts_reach_the_ranks_that_they_are_for(make_communicator, message_bytes, many):
    communicator = make_communicator(message_bytes=message_bytes)
    size, rank = communicator.size, communicator.rank
    drawn = np.random.default_rng(many).integers(0, 3, (size, many, size))
    with RecordingHandle(communicator) as handle:
        theirs = exchange_counts(communicator, drawn[rank], "testing")
    np.testing.assert_array_equal(theirs, drawn[:, :, rank].T)
    assert handle.largest <= message_bytes
    if message_bytes > 64:
        sent = [nbytes for name, nbytes in handle.messages if name == "Isend"]
        assert len(sent) == ((size - 1).bit_length() if many else 0)


def test_gather_nothing(make_communicator):
    communicator = make_communicator()
    gathered = gather_bytes(communicator, b"", "testing")
    assert gathered == ([b""] * communicator.size if communicator.is_root else [])


@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "c16"])
@pytest.mark.parametrize("length", [0, 1, 4, 5, 1000])
def test_mean_buffers(comm, make_communicator, dtype, length):
    communicator = make_communicator(message_bytes=64)
    value = complex(2, -3) if dtype.startswith("c") else 2
    array = np.full(length, value * comm.rank, dtype) + np.arange(length, dtype=dtype)
    with RecordingHandle(communicator) as handle:
        mean_buffers(communicator, [array], "testing")
    expected = np.full(length, value * (comm.size - 1) / 2, dtype)
    np.testing.assert_allclose(array, expected + np.arange(length, dtype=dtype), rtol=1e-6)
    assert handle.largest <= 64


def test_the_mean_is_the_same_to_the_last_bit(comm, make_communicator):
    communicator = make_communicator(message_bytes=4096)
    array = np.random.default_rng(comm.rank).standard_normal(5000)
    mean_buffers(communicator, [array], "testing")
    assert_same(comm, array.tobytes())


@pytest.mark.parametrize(
    ("operation", "expected"), [("min", min), ("max", max), ("sum", sum)]
)
def test_all_reduce(make_communicator, operation, expected):
    communicator = make_communicator()
    ranks = range(communicator.size)
    mine = np.array([communicator.rank, -communicator.rank, 7])
    found = communicator.all_reduce(mine, operation, "testing")
    columns = [list(ranks), [-rank for rank in ranks], [7] * communicator.size]
    assert found.tolist() == [expected(column) for column in columns]
    assert mine.tolist() == [communicator.rank, -communicator.rank, 7]


def test_digests_that_differ_are_told_on_all_ranks(make_communicator):
    communicator = make_communicator(message_bytes=64)
    for culprit in range(communicator.size):
        digests = [digest_bytes(b"%d" % i) for i in range(300)]
        if communicator.rank == culprit:
            digests[7] = digest_bytes(b"other")
            # Equal halves: a digest is compared as a whole.
            digests[250] = digests[250][:8] + bytes(8)
        with RecordingHandle(communicator) as handle:
            differs = differing_digests(communicator, digests, "testing")
        expected = [7, 250] if communicator.size > 1 else []
        assert np.flatnonzero(differs).tolist() == expected
        assert len(differs) == 300
        assert handle.largest <= 64


def test_equal_digests_do_not_differ(make_communicator):
    communicator = make_communicator()
    for digests in ([], [bytes(16)], [b"\xff" * 16, bytes(16)], [digest_bytes(b"")] * 50):
        differs = differing_digests(communicator, digests, "testing")
        assert differs.tolist() == [False] * len(digests)


def test_compare_texts(comm, make_communicator):
    communicator = make_communicator(message_bytes=64)
    assert compare_texts(communicator, "testing", ["a", "ä" * 5000]) == []
    assert compare_texts(communicator, "testing", []) == []
    last = comm.size - 1
    mine = ["a", "other"] if comm.rank == last else ["a", "b"]
    found = compare_texts(communicator, "testing", mine)
    assert_same(comm, found)
    if comm.size == 1:
        assert found == []
    else:
        host = communicator.hosts[last]
        line = f"rank {last} on {host} has ['a', 'other'], root has ['a', 'b']"
        assert found == [line]


def test_compare_texts_names_every_rank_that_is_not_like_root(comm, make_communicator):
    communicator = make_communicator()
    found = compare_texts(communicator, "testing", [str(comm.rank)] * comm.rank)
    assert_same(comm, [line.split(" on ")[0] for line in found])
    expected = [f"rank {rank}" for rank in range(1, comm.size)]
    assert [line.split(" on ")[0] for line in found] == expected


def test_messages_of_the_user_are_not_taken_for_ours(comm, make_communicator):
    communicator = make_communicator()
    token = np.zeros(1, np.uint8)
    # The tags that the library uses, on the communicator that it was made from.
    requests = [
        comm.Isend(token, dest=(comm.rank + 1) % comm.size, tag=tag) for tag in (7001, 7002)
    ]
    gathered = gather_bytes(communicator, bytes(200), "testing")
    assert len(gathered) == (comm.size if communicator.is_root else 0)
    assert communicator.all_reduce(np.ones(1), "sum", "testing")[0] == comm.size
    for tag in (7001, 7002):
        comm.Recv(np.empty_like(token), source=(comm.rank - 1) % comm.size, tag=tag)
    for request in requests:
        request.Wait()


def test_ranks_of_a_part_of_the_job(comm, make_communicator):
    part = comm.Split(color=comm.rank % 2, key=-comm.rank)
    communicator = make_communicator(part)
    assert (communicator.rank, communicator.size) == (part.rank, part.size)
    assert len(communicator.hosts) == part.size
    root_is = bcast_json(communicator, comm.rank, "testing")
    assert root_is == max(r for r in range(comm.size) if r % 2 == comm.rank % 2)
    part.Free()
