# SPDX-License-Identifier: Apache-2.0
"""Each box has one owner among its holders, and the owners' bytes are balanced."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.decomposition.owners import Duplicate, assign_owners


@st.composite
def holdings(draw):
    """Deal boxes of a few leaves to ranks, any of them to several, some empty."""
    tiles = [[] for _ in range(draw(st.integers(1, 5)))]
    ranks = st.lists(st.integers(0, len(tiles) - 1), min_size=1, max_size=6)
    for number in range(draw(st.integers(0, 12))):
        box = Box((number,), (draw(st.integers(0, 9)),))
        for rank in draw(ranks):
            tiles[rank].append((draw(st.integers(0, 2)), box))
    return tiles, [1, 8, 3], draw(st.lists(st.integers(0, 50), min_size=5, max_size=5))


@given(holdings())
def test_each_box_has_one_owner_and_all_others_are_its_duplicates(drawn):
    tiles, itemsizes, loads = drawn
    found = assign_owners(tiles, itemsizes, loads[: len(tiles)])
    assert len(found.owned) == len(tiles)
    owned = [(r, i) for r, numbers in enumerate(found.owned) for i in numbers]
    written = [tiles[r][i] for r, i in owned]
    held = {tile for shown in tiles for tile in shown if tile[1].size}
    assert sorted(written) == sorted(held)
    others = [(one.rank, one.number) for one in found.duplicates]
    everything = [
        (r, i) for r, shown in enumerate(tiles) for i, t in enumerate(shown) if t[1].size
    ]
    assert sorted(owned + others) == everything
    for one in found.duplicates:
        assert (one.owner, one.owners_number) in owned
        assert tiles[one.rank][one.number] == tiles[one.owner][one.owners_number]
    assert all(list(numbers) == sorted(numbers) for numbers in found.owned)


def written_by_each(ranks, sizes, loads):
    """Let all ranks hold all boxes; return the bytes that each rank writes."""
    tiles = [[(0, Box((i,), (n,))) for i, n in enumerate(sizes)]] * ranks
    found = assign_owners(tiles, [8], loads)
    return [
        load + 8 * sum(sizes[i] for i in numbers)
        for load, numbers in zip(loads, found.owned, strict=True)
    ]


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=6),
    st.lists(st.integers(1, 100), max_size=20),
)
def test_ranks_that_write_other_bytes_get_fewer_boxes(loads, sizes):
    written = written_by_each(len(loads), sizes, loads)
    share = sum(written) / len(loads)
    assert max(written) <= max(*loads, share + 8 * max(sizes, default=0))


@given(st.integers(1, 3), st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_no_rank_writes_more_than_four_thirds_of_the_optimum(ranks, sizes):
    optimum = min(
        max(
            sum(8 * n for n, owner in zip(sizes, dealt, strict=True) if owner == rank)
            for rank in range(ranks)
        )
        for dealt in itertools.product(range(ranks), repeat=len(sizes))
    )
    assert max(written_by_each(ranks, sizes, [0] * ranks)) <= 4 / 3 * optimum


def test_a_box_goes_to_the_holder_that_writes_least_otherwise():
    wide, shared, small = Box((0,), (9,)), Box((9,), (4,)), Box((13,), (1,))
    tiles = [[(0, wide), (0, shared)], [(0, shared), (0, small)], [(0, shared)]]
    found = assign_owners(tiles, [8])
    assert found.owned == ((0,), (1,), (0,))
    assert found.duplicates == (Duplicate(0, 1, 2, 0), Duplicate(1, 0, 2, 0))
    assert assign_owners(tiles, [8], [0, 0, 999]).owned == ((0,), (0, 1), ())


def test_a_rank_that_holds_a_box_twice_writes_it_once():
    box = Box((), ())
    found = assign_owners([[(0, box), (0, box)], []], [8])
    assert found.owned == ((0,), ())
    assert found.duplicates == (Duplicate(0, 1, 0, 0),)
