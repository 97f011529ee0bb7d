# SPDX-License-Identifier: Apache-2.0
"""Broadcasts along chains of hosts, which the ranks of one machine only pretend to be."""

import time
import tracemalloc

import numpy as np
import pytest

from mpi_ckpt.comm import bcast_buffers, bcast_bytes, broadcast, gather_bytes, topology
from tests.ranks import RecordingHandle, groupings, randoms

# Pieces, buckets and the window scaled down by a thousand.
PIECE = 256
LEAST = 64
LENGTHS = {
    "nothing": [],
    "empty": [0, 0],
    "one byte": [1],
    "short of a chain": [LEAST],
    "just a chain": [4 * LEAST],
    "borders": [0, 255, 256, 257, 0, 511, 512, 513, 1],
    "fused": [1, 7, 8, 9, 0, 31, 32, 33] * 20,
    "longer than the window": [100 * PIECE + 1],
    "mixed": [3, 40 * PIECE, 5, 8, 2 * PIECE, 0, 1, 17 * PIECE - 1, 20],
}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(topology, "_CHAIN_PIECE_BYTES", PIECE)
    monkeypatch.setattr(topology, "_CHAIN_PIECE_BYTES_LEAST", LEAST)


def check_bcast(communicator, contents, source):
    if communicator.rank == source:
        buffers = [memoryview(content) for content in contents]  # read-only
    else:
        buffers = [memoryview(bytearray(len(content))) for content in contents]
    bcast_buffers(communicator, buffers, "testing", source)
    assert [bytes(buffer) for buffer in buffers] == contents


@pytest.mark.parametrize("case", LENGTHS)
def test_any_grouping_and_any_source(comm, on_hosts, make_communicator, small_pieces, case):
    stream = randoms(case)
    for hosts in groupings(comm.size):
        on_hosts(hosts)
        communicator = make_communicator()
        for source in range(comm.size):
            contents = [stream.randbytes(length) for length in LENGTHS[case]]
            check_bcast(communicator, contents, source)


def test_random_shapes(comm, on_hosts, make_communicator, small_pieces):
    stream = randoms("chains")
    for hosts in groupings(comm.size):
        on_hosts(hosts)
        communicator = make_communicator()
        for _ in range(8):
            communicator.message_bytes = stream.randint(64, 1000)
            lengths = [
                int(stream.expovariate(1 / 700)) if stream.random() < 0.9 else 0
                for _ in range(stream.randint(0, 40))
            ]
            contents = [stream.randbytes(length) for length in lengths]
            with RecordingHandle(communicator) as handle:
                check_bcast(communicator, contents, stream.randrange(comm.size))
            assert handle.largest <= communicator.message_bytes


def test_each_link_carries_each_byte_once(comm, on_hosts, make_communicator, small_pieces):
    lengths = [5000, 1, 20, 30_000, 8]
    for hosts in groupings(comm.size):
        on_hosts(hosts)
        communicator = make_communicator()
        if len(set(hosts)) == 1:
            assert communicator.node is None
            continue
        for source in range(comm.size):
            with RecordingHandle(communicator) as handle:
                check_bcast(communicator, [bytes(length) for length in lengths], source)
            link = communicator.topology.link(comm.rank, source)
            received = sum(lengths) if link.before is not None else 0
            sent = sum(lengths) if link.after is not None else 0
            assert handle.sent_by("Irecv") == received
            assert handle.sent_by("Isend") == sent
            assert handle.sent_by("Ibcast") == 0
            assert handle.largest <= PIECE


def test_what_does_not_fill_a_chain_goes_by_the_library(comm, on_hosts, make_communicator):
    on_hosts([str(rank) for rank in range(comm.size)])
    communicator = make_communicator()
    content = randoms("little").randbytes(10_000)
    with RecordingHandle(communicator) as handle:
        check_bcast(communicator, [content], comm.size - 1)
    assert handle.sent_by("Isend") == handle.sent_by("Irecv") == 0
    assert handle.sent_by("Ibcast") == (len(content) if comm.size > 1 else 0)


def test_neighbouring_bytes_are_left_alone(comm, on_hosts, make_communicator, small_pieces):
    for hosts in groupings(comm.size):
        on_hosts(hosts)
        communicator = make_communicator()
        memory = bytearray(b"#" * 30_000)
        middle = memoryview(memory)[100:29_900]
        if comm.rank == comm.size - 1:
            middle[:] = b"x" * 29_800
        parts = [middle[:5], middle[5:20_000], middle[20_000:]]
        bcast_buffers(communicator, parts, "testing", comm.size - 1)
        assert bytes(memory) == b"#" * 100 + b"x" * 29_800 + b"#" * 100


def test_pieces_of_real_length(comm, on_hosts, make_communicator):
    content = randoms("real").randbytes((20 << 20) + 3)
    for hosts in (["a", "b", "a", "b"], ["a", "b", "c", "d"], ["a"] * 4):
        on_hosts(hosts[: comm.size])
        communicator = make_communicator()
        for source in range(comm.size):
            check_bcast(communicator, [content[:1000], content, content[-5:]], source)


def test_other_transfers_between_broadcasts(
    comm, on_hosts, make_communicator, small_pieces
):
    # They use the same tag between the same ranks.
    on_hosts([str(rank) for rank in range(comm.size)])
    communicator = make_communicator(message_bytes=64)
    for source in range(comm.size):
        check_bcast(communicator, [bytes([source]) * 3000], source)
        gathered = gather_bytes(communicator, b"%d" % comm.rank * 500, "testing")
        expected = [b"%d" % rank * 500 for rank in range(comm.size)]
        assert gathered == (expected if communicator.is_root else [])
        assert bcast_bytes(communicator, b"y" * 2000, "testing") == b"y" * 2000


@pytest.mark.parametrize("slow", ["first", "last"])
def test_a_slow_rank_is_waited_for(
    comm, on_hosts, make_communicator, small_pieces, monkeypatch, slow
):
    on_hosts([str(rank) for rank in range(comm.size)])
    communicator = make_communicator()
    content = randoms(slow).randbytes(50_000)
    if comm.rank == {"first": 0, "last": comm.size - 1}[slow]:
        pack = broadcast._Flow._pack

        def slowly(self, message):
            time.sleep(1e-3)
            return pack(self, message)

        monkeypatch.setattr(broadcast._Flow, "_pack", slowly)
    check_bcast(communicator, [content, *[b"z" * 5] * 300], 0)


@pytest.mark.parametrize("hosts", ["aaaa", "abcd", "abab"])
def test_a_window_of_buckets_is_all_it_takes(comm, on_hosts, make_communicator, hosts):
    on_hosts(hosts[: comm.size])
    communicator = make_communicator(message_bytes=32 << 10)
    contents = np.zeros((6000, 4 << 10), np.uint8)  # 750 buckets
    if comm.rank == 0:
        contents[:] = np.arange(6000)[:, np.newaxis] % 251
    buffers = [memoryview(row) for row in contents]
    tracemalloc.start()
    try:
        bcast_buffers(communicator, buffers, "testing")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (contents == np.arange(6000)[:, np.newaxis] % 251).all()
    window = 2 * broadcast._IN_FLIGHT * (32 << 10)
    assert peak < window + (3 << 20)  # and what lists and arrays weigh themselves


def test_closing_frees_what_the_ranks_of_a_host_share(comm, on_hosts, make_communicator):
    for hosts in groupings(comm.size):
        on_hosts(hosts)
        communicator = make_communicator()
        several = len(set(hosts)) not in (1, comm.size)
        assert (communicator.node is not None) == several
        if several:
            here = [rank for rank in range(comm.size) if hosts[rank] == hosts[comm.rank]]
            assert communicator.node.allgather(comm.rank) == here
        communicator.close()
        if several:
            assert not communicator.node
        communicator.close()
