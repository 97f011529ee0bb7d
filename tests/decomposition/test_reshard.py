# SPDX-License-Identifier: Apache-2.0
"""Any tiles reach any other tiles: played by the ranks' own plans, against NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.decomposition.boxes import Box, grow, wrapped
from tests.decomposition.drawing import SHAPES, inner_boxes, tilings
from tests.decomposition.exchange import Case, expected_bytes, play

DTYPES = ("u1", "<i2", "<f8", "S3", "S12")


@st.composite
def generations(draw, dtypes=DTYPES):
    """Draw leaves and the files that have their tiles, with gaps, in any order."""
    arrays, tiles = [], []
    number = 0
    for leaf in range(draw(st.integers(1, 3))):
        # Leaves that are cut alike are planned at once, whatever the size of an element.
        shape = draw(SHAPES) if leaf == 0 or draw(st.booleans()) else arrays[0].shape
        dtype = np.dtype(draw(st.sampled_from(dtypes)))
        count = int(np.prod(shape, dtype=int))
        array = np.arange(number, number + count * dtype.itemsize).astype("u1").view(dtype)
        arrays.append(array.reshape(shape))
        number += 7 * count + 1
        if leaf and shape == arrays[0].shape and draw(st.booleans()):
            tiles += [(leaf, box) for first, box in tiles if first == 0]
        else:
            tiles += [(leaf, box) for box in draw(tilings(shape, most=8))]
    files = [bytearray() for _ in range(draw(st.integers(1, 4)))]
    saved = []
    for leaf, box in draw(st.permutations(tiles)):
        file = draw(st.integers(0, len(files) - 1))
        files[file] += b"\x99" * draw(st.sampled_from([0, 0, 0, 3, 40]))
        saved.append((leaf, file, len(files[file]), box))
        files[file] += arrays[leaf][slice_of(box)].tobytes()
    return arrays, saved, [bytes(one) for one in files]


def slice_of(box):
    return tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))


@st.composite
def wishes(draw, arrays, size):
    """Draw what ranks want: tilings with ghosts, any boxes, or nothing of a leaf."""
    wanted = []

    def add(leaf, rank, box):
        wanted.append((leaf, rank, len(wanted), box))

    for leaf, array in enumerate(arrays):
        kind = draw(st.sampled_from(["tiling", "ghosts", "any", "whole", "none"]))
        if leaf and array.shape == arrays[0].shape and draw(st.booleans()):
            for box in [box for first, _, _, box in wanted if first == 0]:
                add(leaf, draw(st.integers(0, size - 1)), draw(moved(box, array.shape)))
        elif kind in ("tiling", "ghosts"):
            most = 2 if kind == "ghosts" else 0
            ghosts = [(draw(st.integers(0, most)), draw(st.integers(0, most)))] * array.ndim
            periodic = [draw(st.booleans())] * array.ndim
            for box in draw(tilings(array.shape, most=8)):
                rank = draw(st.integers(0, size - 1))
                for part, _ in wrapped(grow(box, ghosts), array.shape, periodic):
                    add(leaf, rank, part)
        elif kind == "any":
            for box in draw(st.lists(inner_boxes(array.shape), max_size=4)):
                add(leaf, draw(st.integers(0, size - 1)), box)
        elif kind == "whole":
            for rank in range(size):
                add(leaf, rank, Box.whole(array.shape))
    return draw(st.permutations(wanted))


@st.composite
def moved(draw, box, shape):
    """Draw a box of the same shape, often the same."""
    if draw(st.booleans()):
        return box
    ranges = zip(shape, box.shape, strict=True)
    return Box(tuple(draw(st.integers(0, size - n)) for size, n in ranges), box.shape)


@st.composite
def cases(draw, dtypes=DTYPES):
    arrays, saved, files = draw(generations(dtypes))
    size = draw(st.integers(1, 4))
    return Case(arrays, saved, draw(wishes(arrays, size)), files, size)


@st.composite
def options(draw, case):
    return {
        "digest_bytes": draw(st.integers(1, 40)) * draw(st.sampled_from([1, 8])),
        "readers": draw(
            st.lists(st.integers(0, case.size - 1), min_size=1, unique=True).map(sorted)
        ),
        "window_bytes": draw(st.sampled_from([2, 20, 200, 1 << 20])),
    }


@pytest.fixture(autouse=True, scope="module")
def small():
    """Let small windows be worth a read, and let gaps be skipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpi_ckpt.decomposition.turns._SHORT_BYTES", 8)
        patch.setattr("mpi_ckpt.decomposition.turns._GAP_BYTES", 16)
        yield


@given(st.data())
def test_every_wanted_tile_arrives_as_numpy_slices_it(data):
    case = data.draw(cases())
    drawn = data.draw(options(case))
    played = play(case, case.plan(**drawn))
    for leaf, rank, number, box in case.wanted:
        assert bytes(played.tiles[rank, number]) == expected_bytes(case, leaf, box)


@given(st.data())
def test_each_byte_is_read_once_by_a_reader_within_its_window(data):
    case = data.draw(cases())
    drawn = data.draw(options(case))
    played = play(case, case.plan(**drawn))
    half = drawn["window_bytes"] // 2
    assert set(played.loads) <= set(drawn["readers"])
    end_of = {}
    for file, start, end in sorted(played.reads):
        assert start >= end_of.get(file, 0)
        end_of[file] = end
        assert end - start <= max(half, drawn["digest_bytes"])


@given(st.data())
def test_no_receiver_gets_more_than_half_a_window_of_several(data):
    case = data.draw(cases())
    drawn = data.draw(options(case))
    played = play(case, case.plan(**drawn))
    incoming = {}
    for turn, _, receiver, nbytes in played.messages:
        incoming.setdefault((turn, receiver), []).append(nbytes)
    for messages in incoming.values():
        assert len(messages) == 1 or sum(messages) <= drawn["window_bytes"] // 2
    sent = [(turn, sender, receiver) for turn, sender, receiver, _ in played.messages]
    assert len(sent) == len(set(sent))
    assert all(sender != receiver for _, sender, receiver in sent)


@given(st.data())
def test_same_tiles_on_as_many_ranks_send_nothing(data):
    arrays, saved, files = data.draw(generations())
    rank_of = data.draw(st.permutations(range(len(files))))
    wanted = [(leaf, rank_of[file], i, box) for i, (leaf, file, _, box) in enumerate(saved)]
    case = Case(arrays, saved, data.draw(st.permutations(wanted)), files, len(files))
    drawn = data.draw(options(case)) | {"readers": range(len(files))}
    played = play(case, case.plan(**drawn))
    assert played.messages == []
    for leaf, rank, number, box in case.wanted:
        assert bytes(played.tiles[rank, number]) == expected_bytes(case, leaf, box)


@given(st.data())
def test_no_reader_reads_much_more_than_its_share(data):
    case = data.draw(cases())
    drawn = data.draw(options(case))
    plan = case.plan(**drawn)
    played = play(case, plan)
    total = sum(end - start for _, start, end in played.reads)
    longest = max((end - start for _, start, end in played.reads), default=0)
    if played.messages:
        share = total / len(drawn["readers"])
        assert max(played.loads.values(), default=0) <= 1.05 * share + longest


@given(st.data())
def test_the_order_of_the_wanted_tiles_changes_nothing(data):
    case = data.draw(cases())
    drawn = data.draw(options(case))
    first = case.plan(**drawn)
    case.wanted = data.draw(st.permutations(case.wanted))
    second = case.plan(**drawn)
    for rank in range(case.size):
        assert first.of_rank(rank).encode() == second.of_rank(rank).encode()


@given(st.data())
def test_a_missing_tile_is_named(data):
    case = data.draw(cases())
    drawn = data.draw(options(case))
    wanted = [one for one in case.wanted if one[3].size]
    if not wanted:
        return
    leaf, rank, number, box = data.draw(st.sampled_from(wanted))
    case.wanted = [(leaf, rank, number, box)]
    case.saved = [one for one in case.saved if one[0] != leaf]
    with pytest.raises(ValueError, match=f"leaf {leaf} .* tile {number} of rank {rank}"):
        case.plan(**drawn)


def test_an_element_saved_twice_is_refused():
    array = np.arange(4)
    saved = [(0, 0, 0, Box((0,), (3,))), (0, 0, 24, Box((2,), (2,)))]
    case = Case([array], saved, [(0, 1, 5, Box((0,), (4,)))], [], 2)
    message = r"leaf 0 have 5 elements for \[0:4\], which is tile 5 of rank 1; expected 4"
    with pytest.raises(ValueError, match=message):
        case.plan(digest_bytes=64, readers=[0], window_bytes=64)


def test_leaves_that_are_cut_alike_are_planned_once(monkeypatch):
    from mpi_ckpt.decomposition import fragments

    seen = []
    find = fragments.find_fragments
    monkeypatch.setattr(
        fragments, "find_fragments", lambda s, *rest: seen.append(s) or find(s, *rest)
    )
    halves = [Box((0, 0), (2, 4)), Box((2, 0), (2, 4))]
    columns = [Box((0, 0), (4, 1)), Box((0, 1), (4, 3))]
    arrays = [np.arange(16.0).reshape(4, 4) + i for i in range(9)]
    saved, wanted, files = [], [], [b"", b""]
    for leaf, array in enumerate(arrays):
        for file, box in enumerate(halves):
            saved.append((leaf, file, len(files[file]), box))
            files[file] += array[slice_of(box)].tobytes()
        wanted += [(leaf, rank, leaf, box) for rank, box in enumerate(columns)]
    case = Case(arrays, saved, wanted, files, 2)
    plan = case.plan(digest_bytes=32, readers=[0, 1], window_bytes=1 << 20)
    played = play(case, plan)
    assert [len(one.leaf) for one in seen] == [2]
    for leaf, rank, number, box in wanted:
        assert bytes(played.tiles[rank, number]) == expected_bytes(case, leaf, box)


def cells(shape):
    return [Box(index, (1, 1)) for index in np.ndindex(*shape)]


@pytest.mark.parametrize(
    "leaves",
    [
        # Array, boxes of the saved tiles, wanted box.
        [(np.ones((4, 4), d), [Box.whole((4, 4))], Box((0, 0), (4, 3))) for d in "dB"],
        [(np.ones((4, 2)), [Box((0, 0), (4, 2))], Box((r, 0), (2, 2))) for r in (0, 2)],
        [(np.ones(shape), cells(shape), Box((1, 0), (1, 1))) for shape in ((2, 3), (3, 2))],
    ],
    ids=["element", "wanted box", "saved boxes"],
)
def test_leaves_that_are_alike_but_for(leaves):
    arrays, saved, wanted, file = [], [], [], b""
    for leaf, (ones, boxes, box) in enumerate(leaves):
        arrays.append((ones.cumsum() + 10 * leaf).astype(ones.dtype).reshape(ones.shape))
        for tile in boxes:
            saved.append((leaf, 0, len(file), tile))
            file += arrays[-1][slice_of(tile)].tobytes()
        wanted.append((leaf, 0, leaf, box))
    case = Case(arrays, saved, wanted, [file], 1)
    played = play(case, case.plan(digest_bytes=64, readers=[0], window_bytes=1 << 20))
    for leaf, rank, number, box in wanted:
        assert bytes(played.tiles[rank, number]) == expected_bytes(case, leaf, box)


def test_many_senders_to_one_rank_take_turns():
    array = np.arange(64, dtype="u1")
    saved = [(0, file, 0, Box((8 * file,), (8,))) for file in range(8)]
    files = [array[8 * file : 8 * file + 8].tobytes() for file in range(8)]
    case = Case([array], saved, [(0, 0, 0, Box((0,), (64,)))], files, 8)
    plan = case.plan(digest_bytes=8, readers=range(8), window_bytes=32)
    played = play(case, plan)
    assert bytes(played.tiles[0, 0]) == array.tobytes()
    incoming = {}
    for turn, _, receiver, nbytes in played.messages:
        assert receiver == 0
        incoming[turn] = incoming.get(turn, 0) + nbytes
    assert max(incoming.values()) == 16
    assert plan.turns == 4


def test_messages_with_the_same_bytes_are_known():
    array = np.arange(12.0).reshape(3, 4)
    whole, column = Box((0, 0), (3, 4)), Box((0, 2), (3, 1))
    wanted = [(0, rank, 0, box) for rank, box in enumerate([whole, whole, column, whole])]
    case = Case([array], [(0, 0, 0, whole)], wanted, [array.tobytes()], 4)
    plan = case.plan(digest_bytes=96, readers=[0], window_bytes=1 << 20)
    assert plan.of_rank(0).turn(0).first_alike == (0, 1, 0)
    play(case, plan)
