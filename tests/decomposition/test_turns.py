# SPDX-License-Identifier: Apache-2.0
"""Who reads which window, and when."""

import numpy as np
import pytest

from mpi_ckpt.decomposition.turns import Needs, choose_readers, cut_windows, order_turns

MIB = 1 << 20


def needs_of(*of_windows):
    """Make the needs of windows from a mapping of ranks to bytes for each."""
    rows = [(w, r, n) for w, needs in enumerate(of_windows) for r, n in needs.items()]
    return Needs.count(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))


def chosen(files, lengths, needs, readers, holders=None):
    columns = np.array(files), np.array(lengths)
    return choose_readers(*columns, needs, readers, holders).tolist()


def windows(pieces, **options):
    columns = (np.array(column) for column in zip(*pieces, strict=True))
    return cut_windows(*columns, **options).tolist()


def test_needs_of_fragments_are_added_up():
    columns = np.array([[1, 0, 1, 1], [3, 0, 3, 2], [10, 20, 30, 40]])
    needs = Needs.count(*columns)
    assert needs.by_window(3) == [[(0, 20)], [(2, 40), (3, 40)], []]


def test_windows_end_with_files_gaps_and_their_length():
    pieces = [(0, 0, 4), (0, 4, 6), (0, 6 + 2 * MIB, 7 + 2 * MIB), (1, 0, 5)]
    assert windows(pieces, readers=1, window_bytes=1 << 30) == [0, 2, 3]
    assert windows(pieces, readers=1, window_bytes=8) == [0, 1, 2, 3]
    long = [(0, i * 10 * MIB, (i + 1) * 10 * MIB) for i in range(8)]
    assert windows(long, readers=1, window_bytes=19 * MIB) == list(range(8))
    short = [(0, i * MIB, (i + 1) * MIB) for i in range(64)]
    assert windows(short, readers=1, window_bytes=40 * MIB) == list(range(0, 64, 4))
    assert windows(short, readers=2, window_bytes=40 * MIB) == list(range(0, 64, 2))


def test_every_rank_reads_its_own_file_however_long():
    needs = needs_of({1: 90}, {0: 1}, {1: 900})
    assert chosen([5, 2, 5], [90, 1, 900], needs, [0, 1, 2]) == [1, 0, 1]


def test_replicas_share_what_both_need():
    needs = needs_of(*[{0: 10, 1: 10}] * 6)
    assert chosen([0] * 6, [10] * 6, needs, [0, 1]) == [0, 1, 0, 1, 0, 1]


def test_the_rank_that_needs_most_reads_until_it_has_its_share():
    needs = needs_of(*[{0: 9, 1: 1}] * 4)
    assert chosen([0] * 4, [10] * 4, needs, [0, 1]) == [0, 0, 1, 1]


def test_windows_that_their_ranks_cannot_take_go_to_the_lightest_at_the_end():
    # The third and fourth of rank 0 go to rank 2, which needs nothing, and not to rank 1.
    needs = needs_of({0: 10}, {0: 10}, {0: 10}, {0: 10}, {1: 10}, {1: 10})
    assert chosen([0] * 6, [10] * 6, needs, [0, 1, 2]) == [0, 0, 2, 2, 1, 1]


def test_ranks_that_do_not_read_get_all_from_others():
    needs = needs_of({2: 10}, {2: 10, 1: 2}, {2: 10})
    assert chosen([0, 0, 0], [10] * 3, needs, [0, 1]) == [0, 1, 0]


def test_only_ranks_that_have_a_file_read_it():
    # Each needs one file, which the other has.
    needs = needs_of({0: 10}, {1: 10})
    assert chosen([0, 1], [10, 10], needs, [0, 1]) == [0, 1]
    assert chosen([0, 1], [10, 10], needs, [0, 1], [[1], [0]]) == [1, 0]
    # Rank 2 has both, and reads none while the ranks that need them may.
    assert chosen([0, 1], [10, 10], needs, [0, 1, 2], [[0, 2], [1, 2]]) == [0, 1]
    # Of those that have it, the one that needs most; else the one that has read least.
    needs = needs_of(*[{0: 9, 1: 1}] * 4)
    assert chosen([0] * 4, [10] * 4, needs, [0, 1, 2], [[1, 2]]) == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("window_bytes", "turns"), [(2, [0, 1, 2, 3]), (40, [0, 1, 0, 1]), (60, [0, 1, 0, 0])]
)
def test_a_receiver_closes_a_turn(window_bytes, turns):
    needs = needs_of(*[{3: 10}] * 4)
    found = order_turns(np.array([0, 0, 1, 2]), needs, window_bytes)
    assert found.tolist() == turns


def test_readers_of_their_own_data_all_read_in_each_turn():
    needs = needs_of({0: 10}, {0: 10}, {1: 10}, {1: 10})
    assert order_turns(np.array([0, 0, 1, 1]), needs, 2).tolist() == [0, 1, 0, 1]


def test_readers_with_most_windows_left_choose_first():
    needs = needs_of({3: 10}, {3: 10}, {4: 10}, {5: 10})
    assert order_turns(np.array([0, 1, 1, 1]), needs, 20).tolist() == [1, 0, 1, 2]


def test_what_a_reader_keeps_does_not_count_as_received():
    needs = needs_of({0: 10}, {0: 10})
    assert order_turns(np.array([0, 1]), needs, 20).tolist() == [0, 0]
