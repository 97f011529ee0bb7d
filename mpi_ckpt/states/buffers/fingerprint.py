# SPDX-License-Identifier: Apache-2.0
"""Fingerprints tensors where they are: 128 bits that show whether bytes are the same.

The bytes, as words of 32 bits with sign, are multiplied by keys of 64 bits and added up,
modulo 2**64, for each row of 64 KiB in four lanes. A row's keys are pseudorandom, odd, and
differ between places and lanes. xxh3-128 of the number of bytes and of all rows' sums, in
order, is the fingerprint. Any order of the additions gives the same sum: a device makes
them as it likes.

A change within one word always changes all lanes of its row, since odd keys have inverses.
Of rows that differ in several words, a lane takes at most one pair in 2**32 for the same,
which is the worst case, of words that differ in their highest bits only: four lanes take
one in 2**128. This holds for bytes that do not depend on the keys: against accidents.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from mpi_ckpt.leaves.digest import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["LANES", "ROW_WORDS", "count_rows", "finish", "make_keys", "row_sums"]

ROW_WORDS = 16384
LANES = 4

# The products of so many bytes take eight times as much memory, of the device. In less, its
# cores would have too little to do at a time.
_STEP_BYTES = 4 << 20


def make_keys() -> NDArray[np.uint64]:
    """Return the keys: a row for each lane. Not collective.

    They are the output of splitmix64, made odd, for the numbers from 1 on.
    """
    keys: NDArray[np.uint64] = np.arange(1, LANES * ROW_WORDS + 1, dtype=np.uint64)
    keys *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys ^= keys >> np.uint64(shift)
        keys *= np.uint64(factor)
    keys ^= keys >> np.uint64(31)
    keys |= np.uint64(1)
    return keys.reshape(LANES, ROW_WORDS)


def row_sums(data: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sums of all rows of several runs of bytes, in order, on their device.

    Not collective. Call it within `ordinary`.

    Args:
        data: The bytes of each, on one device.

    Returns:
        A row of ``LANES`` integers for each row of the bytes; `finish` takes those of one
        run. A run without bytes has no row.
    """
    sums: list[torch.Tensor] = []
    for flat in data:
        keys = _keys_on(flat.device)
        for start in range(0, len(flat), _STEP_BYTES):
            sums += _sums(_words(flat[start : start + _STEP_BYTES]), keys)
    return torch.cat(sums) if sums else torch.empty((0, LANES), dtype=torch.int64)


def count_rows(nbytes: int) -> int:
    """Return the number of rows of a run of bytes. Not collective. Thread-safe."""
    return -(-nbytes // (4 * ROW_WORDS))


def finish(sums: NDArray[np.int64], nbytes: int) -> bytes:
    """Return the fingerprint of a run of bytes from its rows' sums, in host memory.

    Not collective. Thread-safe.
    """
    little = np.ascontiguousarray(sums, "<i8")
    return digest_bytes(nbytes.to_bytes(8, "little") + little.tobytes())


def _sums(words: torch.Tensor, keys: torch.Tensor) -> list[torch.Tensor]:
    whole = len(words) // ROW_WORDS
    rows = words[: whole * ROW_WORDS].reshape(whole, 1, ROW_WORDS)
    rest = words[whole * ROW_WORDS :].reshape(1, 1, -1)
    # The product has the type of the keys: 64 bits.
    sums = [(rows * keys).sum(-1)] if whole else []
    return [*sums, (rest * keys[:, : rest.shape[-1]]).sum(-1)] if rest.numel() else sums


def _words(data: torch.Tensor) -> torch.Tensor:
    """Return bytes as words; in memory of their own if they do not begin or end as such."""
    if len(data) % 4:
        data = torch.cat([data, data.new_zeros(-len(data) % 4)])
    elif data.data_ptr() % 4 or data.storage_offset() % 4:
        data = data.clone()
    return data.view(torch.int32)


@lru_cache(maxsize=16)
def _keys_on(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(make_keys().view(np.int64)).to(device)
