# SPDX-License-Identifier: Apache-2.0
"""The order in which a generation is read."""

from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.storage.format.manifest import Extent, Extents
from mpi_ckpt.storage.reading.read_plan import plan_reads

FILES = ("c", "a", "b")
"""In the order in which they are read, which is not that of their names."""


@st.composite
def layouts(draw):
    """Leaves in files, one behind the other with gaps, listed in any order."""
    extents = []
    for file in FILES[: draw(st.integers(1, 3))]:
        offset = draw(st.integers(0, 5000))
        for nbytes in draw(st.lists(st.integers(0, 3000), max_size=6)):
            extents.append(Extent(file, offset, nbytes))
            offset += nbytes + draw(st.sampled_from([0, 0, 1, 3 << 20]))
    return draw(st.permutations(extents))


def plan(extents, *, block_bytes, window_bytes):
    columns = Extents.of(extents)
    return plan_reads(columns, FILES, block_bytes=block_bytes, window_bytes=window_bytes)


@given(layouts(), st.integers(1, 1000), st.integers(1, 5000))
def test_every_byte_is_read_once_in_file_order(extents, block_bytes, window_bytes):
    windows = plan(extents, block_bytes=block_bytes, window_bytes=window_bytes)
    seen = dict.fromkeys(range(len(extents)), 0)
    position = (0, -1)
    for window in windows:
        number = FILES.index(window.file)
        assert (number, window.start) >= position
        position = (number, window.end)
        assert window.end - window.start <= max(window_bytes, block_bytes)
        for block in window.blocks:
            extent = extents[block.leaf]
            assert window.file == extent.file
            assert window.start <= block.offset
            assert block.offset + block.nbytes <= window.end
            assert block.offset == extent.offset + block.start
            assert block.start == seen[block.leaf] == block.number * block_bytes
            seen[block.leaf] = block.end
            assert block.is_last == (block.end == extent.nbytes)
    assert seen == {leaf: extent.nbytes for leaf, extent in enumerate(extents)}


@given(layouts())
def test_empty_leaves_have_a_block_too(extents):
    windows = plan(extents, block_bytes=64, window_bytes=256)
    finished = [b.leaf for window in windows for b in window.blocks if b.is_last]
    assert sorted(finished) == list(range(len(extents)))


def test_dead_bytes_between_leaves_are_skipped():
    far = 10 << 20
    extents = [Extent("a", 0, 100), Extent("a", far, 100)]
    windows = plan(extents, block_bytes=1 << 20, window_bytes=64 << 20)
    assert [(window.start, window.end) for window in windows] == [
        (0, 100),
        (far, far + 100),
    ]


@given(layouts(), st.integers(1, 5000))
def test_groups_hold_the_blocks_of_a_window_side_by_side(extents, window_bytes):
    for window in plan(extents, block_bytes=1000, window_bytes=window_bytes):
        groups = window.groups()
        assert [block for group in groups for block in group] == list(window.blocks)
        for group in groups:
            position = group[0].offset
            for block in group:
                assert block.offset == position
                position += block.nbytes


@given(layouts(), st.integers(1, 5000))
def test_blocks_are_cut_out_of_the_bytes_of_their_window(extents, window_bytes):
    for window in plan(extents, block_bytes=1000, window_bytes=window_bytes):
        if window.end - window.start > 1 << 20:
            continue
        places = (n % 251 for n in range(window.start, window.end))
        data = memoryview(bytes(places))
        for block in window.blocks:
            expected = [n % 251 for n in range(block.offset, block.offset + block.nbytes)]
            assert list(window.cut(data, block)) == expected


def test_large_blocks_are_sent_alone_and_small_neighbours_together():
    large = 1 << 20
    extents = [Extent("a", 0, 10), Extent("a", 10, 20), Extent("a", 30, large)]
    extents += [Extent("a", at + large, 5) for at in (30, 35, 50)]
    (window,) = plan(extents, block_bytes=large, window_bytes=4 * large)
    sent = [[block.leaf for block in group] for group in window.groups()]
    assert sent == [[0, 1], [2], [3, 4], [5]]
    # As whole leaves they are stored many at a time, whatever brings them.
    assert all(group.are_leaves for group in window.groups())
