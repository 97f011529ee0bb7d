# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.comm.topology import Piece, chain_piece_bytes, plan_messages

LENGTHS = st.lists(
    st.integers(0, 300) | st.sampled_from([0, 1, 16, 64, 128, 129]), max_size=20
)


@given(LENGTHS, st.integers(1, 200))
def test_every_byte_is_sent_once_and_no_message_is_too_large(lengths, message_bytes):
    sent = Counter()
    for message in plan_messages(lengths, message_bytes):
        assert 0 < sum(piece.nbytes for piece in message) <= message_bytes
        for piece in message:
            sent.update((piece.buffer, at) for at in range(piece.start, piece.end))
    assert sent == Counter(
        (b, at) for b, length in enumerate(lengths) for at in range(length)
    )


@given(LENGTHS, st.integers(8, 200), st.sampled_from([1, 2, 4, 8]))
def test_cuts_fall_between_elements(lengths, message_bytes, unit):
    lengths = [length * unit for length in lengths]
    for message in plan_messages(lengths, message_bytes, unit=unit):
        assert all(p.start % unit == 0 and p.end % unit == 0 for p in message)
        assert sum(piece.nbytes for piece in message) <= message_bytes


@given(LENGTHS, st.integers(1, 200))
def test_every_rank_plans_the_same(lengths, message_bytes):
    messages = list(plan_messages(lengths, message_bytes))
    assert messages == list(plan_messages(tuple(lengths), message_bytes))


@given(LENGTHS, st.integers(1, 200))
def test_a_bucket_holds_whole_buffers_only(lengths, message_bytes):
    # Senders pack a bucket from whole buffers: a part of one would not fit.
    for message in plan_messages(lengths, message_bytes):
        if len(message) > 1:
            assert all(p.start == 0 and p.end == lengths[p.buffer] for p in message)


def test_small_buffers_are_fused_and_large_ones_cut():
    messages = list(plan_messages([10, 10, 300, 10], 128))
    assert messages == [
        (Piece(2, 0, 128),),
        (Piece(2, 128, 256),),
        (Piece(2, 256, 300),),
        (Piece(0, 0, 10), Piece(1, 0, 10), Piece(3, 0, 10)),
    ]


def test_many_small_buffers_fill_several_buckets():
    messages = list(plan_messages([16] * 20, 128))
    assert [len(message) for message in messages] == [8, 8, 4]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_needs_no_message(lengths):
    assert list(plan_messages(lengths, 64)) == []


KIB = 1 << 10


def test_one_host_is_no_chain():
    assert chain_piece_bytes(1 << 40, 1) is None


@given(st.integers(0, 1 << 36), st.integers(2, 5000))
def test_pieces_of_a_chain(total_bytes, hosts):
    piece_bytes = chain_piece_bytes(total_bytes, hosts)
    if piece_bytes is None:
        assert total_bytes < hosts * 64 * KIB
    else:
        assert 64 * KIB <= piece_bytes <= 1024 * KIB
        assert piece_bytes % (64 * KIB) == 0
        # As many pieces as hosts at least: a tree would have no fewer turns.
        assert total_bytes >= 64 * KIB * hosts
        filling = (hosts - 1) * piece_bytes
        assert filling <= total_bytes / 32 or piece_bytes == 64 * KIB


@pytest.mark.parametrize(
    ("total_bytes", "hosts", "expected"),
    [
        (128 * KIB - 1, 2, None),
        (128 * KIB, 2, 64 * KIB),
        (32 * 1024 * KIB, 2, 1024 * KIB),
        (32 * 1024 * KIB - 1, 2, 960 * KIB),
        (128 * 1024 * KIB, 4, 1024 * KIB),
        (64 * 1024 * KIB, 4, 640 * KIB),
        (64 * 1024 * KIB, 65, 64 * KIB),
        (1 << 40, 1000, 1024 * KIB),
    ],
)
def test_pieces_are_short_where_the_chain_is_long(total_bytes, hosts, expected):
    assert chain_piece_bytes(total_bytes, hosts) == expected
