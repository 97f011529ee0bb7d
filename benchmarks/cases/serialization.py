# SPDX-License-Identifier: Apache-2.0
"""What it costs to turn the state into bytes, on root, without any disk."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import ceilings, names
from benchmarks.harness import Contender, Group
from benchmarks.peers import to_bytes_contenders
from mpi_ckpt import ArrayState, Options
from mpi_ckpt.leaves.buckets import read_leaves
from mpi_ckpt.leaves.digest import digest_bytes, digest_many

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.setting import Setting

__all__ = ["groups"]

# As large as the block that a save fills while the one before is written.
_BLOCK_BYTES = 4 << 20


def groups(setting: Setting) -> Iterator[Group]:
    """See the module."""
    copy = ceilings.WarmCopy(setting.state.values()) if setting.is_root else None
    views = [array.reshape(-1).view(np.uint8).data for array in setting.state.values()]
    stream = io.BytesIO()

    def pickled() -> None:
        # Over the bytes of the time before: fresh memory would cost more than the work.
        stream.seek(0)
        pickle.dump(setting.state, stream, protocol=5)

    def hashed() -> None:
        for view in views:
            digest_bytes(view)

    contenders = [
        Contender(names.MEMCPY, setting.on_root(lambda: copy and copy()), ceiling=True),
        Contender("xxh3-128, one thread", setting.on_root(hashed), ceiling=True),
        Contender(
            "mpi_ckpt: digests, then copies through a block",
            setting.on_root(lambda: _as_a_save_does(setting)),
        ),
        Contender("pickle to memory", setting.on_root(pickled)),
        *to_bytes_contenders(setting),
    ]
    yield Group("to bytes", setting.nbytes, contenders)


def _as_a_save_does(setting: Setting) -> None:
    leaves = ArrayState("adam", setting.state).capture().leaves
    reads = [leaf.buffer.read for leaf in leaves]
    sizes = np.array([leaf.spec.nbytes for leaf in leaves])
    digest_many(lambda i, j: read_leaves(leaves[i:j]), sizes, Options().io.digest_threads)
    block = memoryview(bytearray(_BLOCK_BYTES))
    for read in reads:
        data = read()
        for start in range(0, len(data), _BLOCK_BYTES):
            piece = data[start : start + _BLOCK_BYTES]
            block[: len(piece)] = piece
