# SPDX-License-Identifier: Apache-2.0
"""The order in which a generation is read."""

from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt.engine.read_plan import Place, plan_reads


@st.composite
def layouts(draw):
    """Leaves in files, one behind the other with gaps, listed in any order."""
    places = []
    for file in range(draw(st.integers(1, 3))):
        offset = draw(st.integers(0, 5000))
        for nbytes in draw(st.lists(st.integers(0, 3000), max_size=6)):
            places.append(Place(file, offset, nbytes))
            offset += nbytes + draw(st.sampled_from([0, 0, 1, 3 << 20]))
    return draw(st.permutations(places))


@given(layouts(), st.integers(1, 1000), st.integers(1, 5000))
def test_every_byte_is_read_once_in_file_order(places, block_bytes, window_bytes):
    batches = plan_reads(places, block_bytes=block_bytes, window_bytes=window_bytes)
    seen = dict.fromkeys(range(len(places)), 0)
    position = (0, -1)
    for batch in batches:
        assert (batch.file, batch.start) >= position
        position = (batch.file, batch.end)
        assert batch.end - batch.start <= max(window_bytes, block_bytes)
        for piece in batch.pieces:
            place = places[piece.leaf]
            assert batch.file == place.file
            assert batch.start <= piece.offset
            assert piece.offset + piece.nbytes <= batch.end
            assert piece.offset == place.offset + piece.start
            assert piece.start == seen[piece.leaf] == piece.block * block_bytes
            seen[piece.leaf] = piece.end
            assert piece.last == (piece.end == place.nbytes)
    assert seen == {leaf: place.nbytes for leaf, place in enumerate(places)}


@given(layouts())
def test_empty_leaves_have_a_piece_too(places):
    batches = plan_reads(places, block_bytes=64, window_bytes=256)
    finished = [p.leaf for batch in batches for p in batch.pieces if p.last]
    assert sorted(finished) == list(range(len(places)))


def test_dead_bytes_between_leaves_are_skipped():
    far = 10 << 20
    places = [Place(0, 0, 100), Place(0, far, 100)]
    batches = plan_reads(places, block_bytes=1 << 20, window_bytes=64 << 20)
    assert [(b.start, b.end) for b in batches] == [(0, 100), (far, far + 100)]


@given(layouts(), st.integers(1, 5000))
def test_spans_hold_the_pieces_of_a_batch_side_by_side(places, window_bytes):
    for batch in plan_reads(places, block_bytes=1000, window_bytes=window_bytes):
        spans = batch.spans()
        assert [p for span in spans for p in span.pieces] == batch.pieces
        for span in spans:
            position = span.start
            for piece in span.pieces:
                assert piece.offset == position
                position += piece.nbytes
            assert position == span.end


def test_large_pieces_are_sent_alone_and_small_neighbours_together():
    large = 1 << 20
    places = [Place(0, 0, 10), Place(0, 10, 20), Place(0, 30, large)]
    places += [Place(0, 30 + large, 5), Place(0, 35 + large, 5), Place(0, 50 + large, 5)]
    (batch,) = plan_reads(places, block_bytes=large, window_bytes=4 * large)
    sent = [[piece.leaf for piece in span.pieces] for span in batch.spans()]
    assert sent == [[0, 1], [2], [3, 4], [5]]
