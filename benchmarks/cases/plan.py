# SPDX-License-Identifier: Apache-2.0
"""The plan of a save and of a restore of cut arrays: processor time on root, no bytes."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from benchmarks import names
from benchmarks.harness import Contender, Group
from mpi_ckpt import ShardedArrayState
from mpi_ckpt.collector import without_collections
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.decomposition.fragments import SavedTiles, WantedTiles
from mpi_ckpt.decomposition.reshard import plan_reshard
from mpi_ckpt.engine.save.cut.cut_forms import encode_forms, join_forms
from mpi_ckpt.engine.sync.captured import CapturedState
from mpi_ckpt.leaves.digest import BLOCK_BYTES
from mpi_ckpt.leaves.leaf import LeafSpec, Tile
from mpi_ckpt.leaves.tiles import cut_leaf
from mpi_ckpt.options import IO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.setting import Setting
    from mpi_ckpt.leaves.leaf import TileBuffer

__all__ = ["Cuts", "encoded_forms", "groups", "large_leaves", "plan_all", "small_leaves"]

Boxes = list[tuple[int, int, Box]]

_ITEM_BYTES = 4
_ORDER = (names.SORT_BOXES, names.TABLES, names.PLAN_RESTORE, names.PLAN_SAVE)


@dataclass(frozen=True, slots=True)
class Cuts:
    """Leaves with their boxes on the ranks that saved, and on those that restore.

    Attributes:
        shapes: Shapes of the leaves.
        saved: Leaf, rank and box of each saved tile.
        wanted: The same of each wanted tile.
        writers: Number of ranks that saved.
        ranks: Number of ranks that restore.
    """

    shapes: Sequence[tuple[int, ...]]
    saved: Boxes
    wanted: Boxes
    writers: int
    ranks: int


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    share = 100 if setting.arguments.smoke else 1
    for name, cuts in (
        (names.PLAN_LARGE, large_leaves(1_000 // share)),
        (names.PLAN_SMALL, small_leaves(20_000 // share)),
    ):
        acts = _acts(cuts) if setting.is_root else {}
        nbytes = len(cuts.saved) * 2 * len(cuts.shapes[0]) * np.dtype(np.int64).itemsize
        yield Group(name, nbytes, [_timed(setting, act, acts.get(act)) for act in _ORDER])


def _acts(cuts: Cuts) -> dict[str, Callable[[], object]]:
    tables = _saved_columns(cuts), _wanted_columns(cuts)
    boxes = np.hstack((tables[0].offsets, tables[0].shapes))
    hosts = ["host"] * cuts.writers
    return {
        names.SORT_BOXES: partial(np.lexsort, boxes.T),
        names.TABLES: partial(_make_columns, cuts),
        names.PLAN_RESTORE: partial(plan_all, cuts, *tables),
        names.PLAN_SAVE: partial(
            join_forms, encoded_forms(cuts), hosts, list(range(cuts.writers))
        ),
    }


def _timed(setting: Setting, name: str, act: Callable[[], object] | None) -> Contender:
    """Return an act on root, with its processor time beside the seconds."""
    spent = {"cpu_seconds": 0.0}

    def run() -> None:
        assert act is not None
        # As within a save and a restore.
        with without_collections():
            began = time.process_time()
            act()
            spent["cpu_seconds"] = time.process_time() - began

    return Contender(
        name,
        setting.on_root(run),
        values=lambda _: dict(spent),
        ceiling=name == names.SORT_BOXES,
        durable=False,
    )


def large_leaves(count: int) -> Cuts:
    """Return leaves of a few shapes on a grid of 64 ranks, wanted on one of 48. Pure."""
    there, here = (4, 4, 4), (2, 4, 6)
    shapes = [((48, 96, 96), (96, 48, 96), (96, 96, 48))[n % 3] for n in range(count)]
    return Cuts(
        shapes,
        [row for leaf, shape in enumerate(shapes) for row in _grid(leaf, shape, there)],
        [row for leaf, shape in enumerate(shapes) for row in _grid(leaf, shape, here)],
        64,
        48,
    )


def small_leaves(count: int) -> Cuts:
    """Return leaves of many shapes in 5 boxes each on 16 ranks, wanted in 4 on 12. Pure."""
    shapes = [(20 + n % 23, 16 + n % 7) for n in range(count)]
    saved, wanted = [], []
    for leaf, shape in enumerate(shapes):
        saved += [
            (leaf, (leaf + at) % 16, box) for _, at, box in _grid(leaf, shape, (5, 1))
        ]
        wanted += [
            (leaf, (leaf + at) % 12, box) for _, at, box in _grid(leaf, shape, (1, 4))
        ]
    return Cuts(shapes, saved, wanted, 16, 12)


def _grid(leaf: int, shape: tuple[int, ...], dims: tuple[int, ...]) -> Boxes:
    """Cut a leaf over a grid of ranks; the last dimension is the fastest."""
    cuts = [
        [n * at // parts for at in range(parts + 1)]
        for n, parts in zip(shape, dims, strict=True)
    ]
    places = itertools.product(*(range(parts) for parts in dims))
    return [
        (
            leaf,
            rank,
            Box(
                tuple(cut[at] for cut, at in zip(cuts, place, strict=True)),
                tuple(cut[at + 1] - cut[at] for cut, at in zip(cuts, place, strict=True)),
            ),
        )
        for rank, place in enumerate(places)
    ]


def plan_all(cuts: Cuts, saved: SavedTiles, wanted: WantedTiles) -> list[bytes]:
    """Return the encoded plan of each rank, as root makes them. Pure."""
    plan = plan_reshard(
        saved,
        wanted,
        itemsizes=np.full(len(cuts.shapes), _ITEM_BYTES, np.int64),
        digest_bytes=BLOCK_BYTES,
        readers=range(cuts.ranks),
        window_bytes=IO().window_bytes,
    )
    return [plan.of_rank(rank).encode() for rank in range(cuts.ranks)]


def _saved_columns(cuts: Cuts) -> SavedTiles:
    ends = [0] * cuts.writers
    rows = []
    for leaf, rank, box in cuts.saved:
        rows.append((leaf, rank, ends[rank], box))
        ends[rank] += box.size * _ITEM_BYTES
    return SavedTiles.of(rows)


def _wanted_columns(cuts: Cuts) -> WantedTiles:
    numbers = [itertools.count() for _ in range(cuts.ranks)]
    return WantedTiles.of(
        (leaf, rank, next(numbers[rank]), box) for leaf, rank, box in cuts.wanted
    )


def _make_columns(cuts: Cuts) -> None:
    _saved_columns(cuts)
    _wanted_columns(cuts)


def encoded_forms(cuts: Cuts) -> list[bytes]:
    """Return what each rank that saves tells of its boxes. Pure."""
    state = ShardedArrayState("fields", {})
    own: list[dict[int, list[Tile]]] = [{} for _ in range(cuts.writers)]
    for leaf, rank, box in cuts.saved:
        # No byte is asked for: the memory of the boxes may be missing.
        own[rank].setdefault(leaf, []).append(Tile(box, cast("TileBuffer", None)))
    encoded = []
    for of_rank in own:
        cut = tuple(
            cut_leaf(LeafSpec(f"leaf-{leaf:05d}", "F32", cuts.shapes[leaf]), tiles)
            for leaf, tiles in of_rank.items()
        )
        captured = CapturedState(state, {}, (), state.form_of(()), cut=cut)
        encoded.append(encode_forms([captured]))
    return encoded
