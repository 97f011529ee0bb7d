# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpi_ckpt import Block
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import CheckpointError, RegistrationError
from mpi_ckpt.states.distributed.grids import GridPart, grid_fault


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))


def fill(block: Block, whole: np.ndarray) -> None:
    """Do what a restore does: write the elements of each target from the whole array."""
    for tile in block.targets():
        data = np.ascontiguousarray(whole[slices(tile.box)]).tobytes()
        view = tile.buffer.view()
        if view is None:
            tile.buffer.write(memoryview(data))
        else:
            view[:] = data


def read(block: Block, dtype: str) -> list[tuple[Box, np.ndarray]]:
    return [
        (tile.box, np.frombuffer(tile.buffer.read(), dtype).reshape(tile.box.shape))
        for tile in block.interior()
    ]


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@dataclass
class World:
    """Ranks as threads: what each gives to allgather reaches all of them."""

    size: int
    given: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)

    def run(self, work) -> list[Any]:
        """Return what `work(comm)` returned or raised, rank by rank."""
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                found[rank] = work(Member(self, rank))
            except CheckpointError as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@dataclass
class Member:
    world: World
    rank: int

    @property
    def size(self) -> int:
        return self.world.size

    def allgather(self, given, /) -> list[Any]:
        self.world.given[self.rank] = given
        self.world.barrier.wait()
        return [self.world.given[rank] for rank in range(self.size)]


WHOLE = np.arange(6 * 5, dtype="i4").reshape(6, 5)


def test_interior_is_saved_and_ghosts_are_filled_but_outside():
    array = np.full((4, 7), -1, "i4")
    block = Block(array, shape=(6, 5), offset=(0, 0), ghosts=1)
    assert block.box == Box((0, 0), (2, 5))
    array[1:3, 1:6] = WHOLE[:2]
    ((box, values),) = read(block, "i4")
    assert box == block.box
    assert (values == WHOLE[:2]).all()
    array[:] = -1
    fill(block, WHOLE)
    expected = np.full((4, 7), -1, "i4")
    expected[1:4, 1:6] = WHOLE[:3]
    assert (array == expected).all()


def test_ghosts_of_each_dimension_and_side():
    array = np.zeros((3 + 2, 5 + 3), "i4")
    block = Block(
        array, shape=(6, 9), offset=(2, 2), ghosts=((2, 0), 0)[::-1] and (1, (1, 2))
    )
    assert block.ghosts == ((1, 1), (1, 2))
    assert block.box == Box((2, 2), (3, 5))
    assert [tile.box for tile in block.targets()] == [Box((1, 1), (5, 8))]


def test_periodic_ghosts_wrap():
    array = np.full((4, 7), -1, "i4")
    block = Block(array, shape=(6, 5), offset=(4, 0), ghosts=1, periodic=True)
    fill(block, WHOLE)
    rows = [3, 4, 5, 0]
    columns = [4, 0, 1, 2, 3, 4, 0]
    assert (array == WHOLE[np.ix_(rows, columns)]).all()
    half = np.full((4, 7), -1, "i4")
    fill(Block(half, shape=(6, 5), offset=(4, 0), ghosts=1, periodic=(True, False)), WHOLE)
    assert (half[:, 1:6] == WHOLE[rows]).all()
    assert (half[:, [0, 6]] == -1).all()


def test_ghosts_wider_than_the_domain_wrap_more_than_once():
    array = np.full(2 + 10, -1, "i4")
    fill(
        Block(array, shape=(2,), offset=(0,), ghosts=5, periodic=True),
        np.array([7, 8]).astype("i4"),
    )
    assert array.tolist() == [8, 7, 8, 7, 8, 7, 8, 7, 8, 7, 8, 7]


VIEWS = {
    "plain": lambda a: a,
    "transposed": lambda a: a.T,
    "strided": lambda a: np.repeat(np.repeat(a, 2, 0), 3, 1)[::2, ::3],
    "reversed": lambda a: a[::-1],
    "fortran": np.asfortranarray,
    "big_endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["f8", "c16", "?", "i2", "M8[s]", "S3"])
def test_bytes_of_every_dtype_and_layout_return(dtype, view):
    whole = np.arange(36).reshape(6, 6).astype(dtype)
    array = VIEWS[view](np.zeros((4, 4), dtype))
    block = Block(array, shape=(6, 6), offset=(1, 0), ghosts=(1, 0))
    fill(block, whole)
    assert (array == whole[:4, :4]).all()
    ((box, values),) = read(block, dtype)
    assert (values == whole[slices(box)]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128, torch.int8], ids=str)
def test_tensors_are_blocks_too(dtype):
    tensor = torch.zeros((6, 4), dtype=dtype).t().requires_grad_(dtype.is_floating_point)
    block = Block(tensor, shape=(4, 9), offset=(0, 3), ghosts=((0, 0), (1, 1)))
    assert block.box == Box((0, 3), (4, 4))
    (target,) = block.targets()
    new = torch.arange(24).reshape(4, 6).to(dtype)
    target.buffer.write(memoryview(as_bytes(new)))
    assert tensor.equal(new)
    (own,) = block.interior()
    assert (
        bytes(own.buffer.read())
        == new[:, 1:5].contiguous().view(torch.uint8).numpy().tobytes()
    )


def test_a_tensor_shows_changes_of_its_interior():
    tensor = torch.zeros(4, 4)
    block = Block(tensor, shape=(2, 2), offset=(0, 0), ghosts=1)
    before = block.interior()[0].buffer.stamp()
    tensor.add_(1)
    assert block.interior()[0].buffer.stamp() > before


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
def test_a_block_without_dimensions_is_a_view(make):
    array = make(())
    block = Block(array, shape=(), offset=())
    array[...] = 3
    (tile,) = block.interior()
    data = bytes(tile.buffer.read())
    assert tile.box == Box((), ())
    array[...] = 0
    tile.buffer.write(memoryview(data))
    assert float(array) == 3


def test_an_empty_interior_is_not_saved():
    block = Block(np.zeros((0, 3)), shape=(4, 3), offset=(2, 0))
    assert block.interior() == block.targets() == []
    assert block.spec("x").shape == (4, 3)


BROKEN = {
    "list": ([1.0], {}, "is a list, expected a NumPy array or a torch tensor"),
    "scalar": (np.float64(1), {}, "array of a block is a NumPy scalar"),
    "masked": (np.ma.zeros(4), {}, "is a numpy.ma.*MaskedArray"),
    "objects": (np.zeros(4, object), {}, "dtype object cannot be saved"),
    "sparse": (torch.zeros(4).to_sparse(), {}, "only dense tensors"),
    "readonly": (np.broadcast_to(np.zeros(4), (4,)), {}, "it is read-only"),
    "overlap": (
        np.lib.stride_tricks.as_strided(np.zeros(4), (4,), (0,)), {}, "overlaps itself",
    ),
    "expanded": (torch.zeros(1).expand(4), {}, "overlaps itself"),
    "dims": (np.zeros(4), {"shape": (4, 4)}, r"shape is \[4, 4\], expected .* 1 dim"),
    "offset_dims": (np.zeros(4), {"offset": ()}, r"offset is \[\], expected"),
    "fraction": (np.zeros(4), {"offset": (0.5,)}, r"offset is \(0.5,\), expected whole"),
    "outside": (
        np.zeros(4), {"shape": (9,), "offset": (6,)}, r"\[6:10\] does not lie .* \[0:9\]",
    ),
    "before": (np.zeros(4), {"shape": (9,), "offset": (-1,)}, r"\[-1:3\] does not lie"),
    "ghosts": (np.zeros(4), {"ghosts": 3}, r"no room for \(\(3, 3\),\) ghost cells"),
    "negative": (np.zeros(4), {"ghosts": -1}, "ghosts is -1, expected a number of cells"),
    "triple": (np.zeros(4), {"ghosts": ((1, 2, 3),)}, "expected a number of cells"),
    "periodic": (np.zeros(4), {"periodic": (True, False)}, "periodic is .* each of 1 dim"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_block_is_refused_with_its_reason(case):
    array, changes, message = BROKEN[case]
    arguments = {"shape": (4,), "offset": (0,), **changes}
    with pytest.raises(RegistrationError, match=message):
        Block(array, **arguments)


@st.composite
def cuts(draw):
    """Draw lengths that add up to the whole, along each of 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    return [draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)) for _ in range(dims)]


@given(cuts(), st.integers(0, 2), st.booleans())
def test_a_grid_covers_the_whole_once_and_fills_every_ghost(lengths, ghosts, wraps):
    dims = [len(along) for along in lengths]
    shape = tuple(map(sum, lengths))
    world = World(int(np.prod(dims)))
    whole = np.arange(np.prod(shape), dtype="i4").reshape(shape)

    def work(comm):
        place = np.unravel_index(comm.rank, dims)
        own = [along[at] for along, at in zip(lengths, place, strict=True)]
        array = np.full([n + 2 * ghosts for n in own], -1, "i4")
        return Block.grid(array, dims, comm, ghosts=ghosts, periodic=wraps)

    covered = np.zeros(shape, int)
    for block in world.run(work):
        assert block.shape == shape
        covered[slices(block.box)] += 1
        fill(block, whole)
        ranges = zip(block.box.offset, block.box.end, strict=True)
        indices = [range(start - ghosts, end + ghosts) for start, end in ranges]
        for at in np.ndindex(block.array.shape):
            here = [along[i] for along, i in zip(indices, at, strict=True)]
            inside = all(0 <= i < n for i, n in zip(here, shape, strict=True))
            if wraps and 0 not in shape:
                expected = whole[tuple(i % n for i, n in zip(here, shape, strict=True))]
            else:
                expected = whole[tuple(here)] if inside else -1
            assert block.array[at] == expected
    assert (covered == 1).all()


def test_rows_follow_in_rank_order():
    rows = [3, 0, 2]
    edges = {0: (0, 1), 1: 0, 2: [(1, 0), (2, 2)]}

    def work(comm):
        low = high = columns = 0
        if comm.rank == 0:
            high = 1
        if comm.rank == 2:
            low, columns = 1, 2
        array = np.zeros((rows[comm.rank] + low + high, 4 + 2 * columns))
        return Block.rows(array, comm, ghosts=edges[comm.rank])

    found = World(3).run(work)
    assert [block.box for block in found] == [
        Box((0, 0), (3, 4)), Box((3, 0), (0, 4)), Box((3, 0), (2, 4)),
    ]  # fmt: skip
    assert {block.shape for block in found} == {(5, 4)}
    assert found[0].targets()[0].box == Box((0, 0), (4, 4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.zeros((2, 3)), np.zeros((2, 4))], "rank 1 has 4 .* dimension 1, rank 0 has 3"),
        ([np.zeros((2, 3)), [1.0]], "rank 1: the array of a block is a list"),
        ([np.zeros((2, 3)), np.zeros(3)], r"rank 1 has a grid of \(2,\) ranks, rank 0"),
        ([np.zeros(()), np.zeros(())], "rank 0: .* no dimension to cut"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused_on_every_rank(arrays, message):
    found = World(2).run(lambda comm: Block.rows(arrays[comm.rank], comm))
    for error in found:
        with pytest.raises(RegistrationError, match=message):
            raise error
    assert len(set(map(str, found))) == 1


def test_parts_that_fit_no_grid_name_both_ranks():
    parts = [GridPart((2, 2), lengths) for lengths in [(2, 3), (2, 1), (4, 3), (5, 1)]]
    fault = grid_fault(parts)
    assert fault.startswith("rank 3 has 5 elements along dimension 0, rank 2 has 4: both")
    assert grid_fault([GridPart((2, 2), (1, 1))] * 3) == (
        "a grid of (2, 2) ranks has 4 places, there are 3 ranks"
    )
    assert grid_fault([GridPart((-1, -1), (1, 1))]) != ""
    assert grid_fault([GridPart((), ())]) == ""
