# SPDX-License-Identifier: Apache-2.0
"""Finds out who is still there when a deadline has passed.

A rank whose deadline passes calls the roll: it tells every rank that it gives up and notes
who answers. A waiting rank answers by giving up as well, so all live ranks raise within
moments of the first; who is silent is named by all.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from mpi_ckpt.comm.abandoned import keep
from mpi_ckpt.comm.launch import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["call_roll", "is_called"]

_TAG = 7001
_SECONDS = 3.0
_PAUSE_SECONDS = 1e-3


def is_called(handle: MPI.Intracomm) -> bool:
    """Tell whether another rank has called the roll. Not collective. Main thread only."""
    # MPI: a probe takes in what has arrived and may find it only the next time.
    anybody = load_mpi().ANY_SOURCE
    return any(handle.Iprobe(source=anybody, tag=_TAG) for _ in range(2))


def call_roll(handle: MPI.Intracomm) -> set[int]:
    """Tell all ranks that this one gives up, and return who answers.

    Not collective. Main thread only. Takes some seconds if one is silent.
    """
    mpi = load_mpi()
    token = np.zeros(1, np.uint8)
    sends = [
        handle.Isend(token, dest=rank, tag=_TAG)
        for rank in range(handle.size)
        if rank != handle.rank
    ]
    present = {handle.rank}
    status = mpi.Status()
    deadline = time.monotonic() + _SECONDS
    while len(present) < handle.size and time.monotonic() < deadline:
        if handle.Iprobe(mpi.ANY_SOURCE, _TAG, status):
            handle.Recv(token, source=status.source, tag=_TAG)
            present.add(status.source)
        else:
            time.sleep(_PAUSE_SECONDS)
    # To a rank that never looked: nobody may ever receive it.
    keep([send for send in sends if not send.Test()])
    return present
